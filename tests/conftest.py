import gc
import json
import os
from pathlib import Path

import pytest
import support.share  # Before torch.
import torch
from safetensors.torch import load_file, save_file
from support import starts
from support.made_once import made_once

os.environ["HF_HUB_OFFLINE"] = "1"
# vLLM's default. Benchmarks that a test imports want to hear less, in all that starts after them.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
assert support.share


GROUP = pytest.StashKey[str]()

# Tests and what they import stay: to look through them for garbage, again and again, is in vain.
gc.disable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks tests by what they start, before any are deselected by marks."""
    for mark in starts.marks(item):
        item.add_marker(mark)
    item.stash[GROUP] = starts.group(item)
    item.add_marker(pytest.mark.xdist_group(item.stash[GROUP]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the groups first that take longest."""
    ranks: dict[str, int] = {}
    for item in items:
        group = item.stash[GROUP]
        ranks[group] = min(ranks.get(group, starts.LAST), starts.rank(item, group))
    items.sort(key=lambda item: ranks[item.stash[GROUP]])


def pytest_collection_finish(session: pytest.Session) -> None:
    """With some versions of pytest, pytest-xdist forgets the groups and says nothing."""
    grouped = session.config.getoption("loadgroup", default=False)
    if grouped and session.items and "@" not in session.items[0].nodeid:
        pytest.exit("pytest-xdist does not see the tests' groups: see pyproject.toml", returncode=3)
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """`tiny-llama` and `cases/<name>`."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def authored(tmp_path_factory):
    """By name, the adapters of tests/support (authored, gated, tuners): not to be changed."""
    pytest.importorskip("peft", reason="the dev extra is not installed")
    return made_once(tmp_path_factory, "authored", _author)


def _author(factory):
    from support.authored import author_all
    from support.gated import author_by_token, author_molora
    from support.tuners import author_tuners

    root = factory.mktemp("authored")
    everything = (
        *author_all(root),
        author_molora(root),
        author_by_token(root),
        *author_tuners(root),
    )
    return {made.name: made for made in everything}


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Golden cases on larger models, where they are."""
    repository = Path(__file__).parents[1]
    result = Path(os.environ.get("MOLEHILL_ORACLES", repository.parent / "shared" / "oracles"))
    if not result.is_dir():
        pytest.skip("the golden cases on larger models do not ship with the project")
    return result


@pytest.fixture
def edited(golden, tmp_path):
    """Copies a golden case, or a directory, with changes: `edited(case, config={...},
    tensors={...})`.

    A value of None removes the field or tensor; a callable gets the old tensor.
    """

    def edit(case, config=None, tensors=None, safetensors=False):
        source, target = golden / "cases" / case, tmp_path / "edited"
        fields = json.loads((source / "adapter_config.json").read_text())
        values = weights(source)
        for name, value in (config or {}).items():
            fields[name] = value
            if value is None:
                del fields[name]
        for name, value in (tensors or {}).items():
            values[name] = value(values[name]) if callable(value) else value
            if value is None:
                del values[name]
        target.mkdir()
        (target / "adapter_config.json").write_text(json.dumps(fields))
        if safetensors:
            save_file(values, target / "adapter_model.safetensors")
        else:
            torch.save(values, target / "adapter_model.bin")
        return target

    return edit


def weights(directory):
    if (directory / "adapter_model.safetensors").exists():
        return load_file(directory / "adapter_model.safetensors")
    return torch.load(directory / "adapter_model.bin", weights_only=True)
