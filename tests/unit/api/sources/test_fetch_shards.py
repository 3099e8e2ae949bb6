"""Adapters whose tensors are in several files that an index names, over real HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.api_client import copy_adapter
from support.file_server import COMMIT, fetch_from_hub, serving, sources

from molehill.engine import formats
from molehill.engine.adapter.errors import AdapterNotFoundError, LimitError, UnsupportedError
from molehill.engine.formats.io import files
from molehill.engine.formats.io.shards import INDEX


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An adapter as PEFT saves it, its tensors in two files."""
    folder = copy_adapter("lora", tmp_path / "adapter")
    tensors = files.read_weights(folder, formats.DEFAULT_LIMITS).tensors
    for name in (files.SAFETENSORS, files.PICKLE):
        (folder / name).unlink(missing_ok=True)
    half = len(tensors) // 2
    index: dict[str, str] = {}
    for i, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        file = f"adapter_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    (folder / "other.safetensors").write_bytes(b"of somebody else")
    return folder


@pytest.fixture
def remote(sharded: Path) -> Iterator[tuple[str, list[str]]]:
    """(URL, paths that were asked for)."""
    with serving(sharded) as served:
        yield served


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != "other.safetensors")


def test_a_url_brings_the_files_that_an_index_names(
    remote: tuple[str, list[str]], sharded: Path
) -> None:
    url, asked = remote
    with sources(url).fetch(f"{url}/files/adapter") as source:
        assert formats.read(source.directory).digest == formats.read(sharded).digest
        fetched = {path.name for path in source.directory.iterdir()}
    assert fetched == {path.name for path in sharded.iterdir()} - {"other.safetensors"}
    assert not [path for path in asked if "other" in path]


@pytest.mark.parametrize(
    ("file", "error", "match"),
    [
        ("../other/adapter_model.safetensors", UnsupportedError, "a .safetensors file beside"),
        ("%2e%2e%2fa.safetensors", UnsupportedError, "a .safetensors file beside"),
        ("adapter_model.bin", UnsupportedError, "a .safetensors file beside"),
        ("missing.safetensors", AdapterNotFoundError, "missing.safetensors: found no such file"),
    ],
)
def test_an_index_leads_nowhere_else(
    remote: tuple[str, list[str]],
    sharded: Path,
    file: str,
    error: type[Exception],
    match: str,
) -> None:
    url, asked = remote
    index = json.loads((sharded / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"] = {**index["weight_map"], first: file}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(error, match=match), sources(url).fetch(f"{url}/files/adapter"):
        pass
    if error is UnsupportedError:
        assert not [path for path in asked if path.endswith("-00002.safetensors")]


def test_the_files_of_an_index_are_bounded_together(
    remote: tuple[str, list[str]], sharded: Path
) -> None:
    url, _ = remote
    total = size(sharded)
    with sources(url, limit=total).fetch(f"{url}/files/adapter"):
        pass
    with (
        pytest.raises(LimitError, match="bytes or more, expected at most"),
        sources(url, limit=total - 1).fetch(f"{url}/files/adapter"),
    ):
        pass
    index = {f"t{i}": f"part-{i}.safetensors" for i in range(1001)}
    (sharded / INDEX).write_text(json.dumps({"weight_map": index}))
    with (
        pytest.raises(LimitError, match="found 1001 files, expected at most 1000"),
        sources(url).fetch(f"{url}/files/adapter"),
    ):
        pass


@pytest.mark.slow
def test_a_hub_brings_the_files_that_an_index_names(
    remote: tuple[str, list[str]], sharded: Path, tmp_path: Path
) -> None:
    url, asked = remote
    total = size(sharded)
    much = "10000000"
    wanted = [("hf://org/adapter", str(total), much), ("hf://org/adapter", str(total - 1), much)]
    result = fetch_from_hub(url, tmp_path, wanted)
    assert result[0] == f"hf://org/adapter@{COMMIT} {formats.read(sharded).digest}"
    assert result[1].startswith("LimitError org/adapter")
    assert not [path for path in asked if "other" in path]
