"""Files that lie, take for ever, or change while they are read, on the shared server."""

import itertools
import json
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.api_client import Api, copy_adapter, edit_config, resident_memory
from support.bombs import BOMBS, write

from molehill.engine import formats
from molehill.engine.formats.io import files

# More than all processes grow by meanwhile on their own, far less than a bomb takes.
BYTES = 256 << 20


def with_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the safetensors header anew, and the data as it was."""
    path = folder / files.SAFETENSORS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = next(value for value in header.values() if "shape" in value)
    return result


def truncated(folder: Path) -> None:
    path = folder / files.SAFETENSORS
    path.write_bytes(path.read_bytes()[:-1])


def endless_header(folder: Path) -> None:
    path = folder / files.SAFETENSORS
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def grown_shape(folder: Path) -> None:
    with_header(folder, lambda header: first(header)["shape"].append(2))


def endless_shape(folder: Path) -> None:
    with_header(folder, lambda header: first(header).update(shape=[2**40, 2**40]))


def overlapping(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        offsets = [value["data_offsets"] for value in header.values() if "shape" in value]
        offsets[1][:] = offsets[0]

    with_header(folder, change)


def oversized(folder: Path) -> None:
    """Sparse: a terabyte that takes no room."""
    os.truncate(folder / files.SAFETENSORS, 1 << 40)


def without_numbers(folder: Path) -> None:
    tensors = load_file(folder / files.SAFETENSORS)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, folder / files.SAFETENSORS)


DAMAGE: dict[Callable[[Path], None], str] = {
    truncated: "corrupt_file",
    endless_header: "corrupt_file",
    grown_shape: "corrupt_file",
    endless_shape: "corrupt_file",
    overlapping: "corrupt_file",
    oversized: "limit_exceeded",
    without_numbers: "non_finite",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_safetensors_are_refused(api: Api, damage: Callable[[Path], None]) -> None:
    """What a header makes up would take for ever to read, and more memory than there is."""
    target = copy_adapter("dora", api.root / f"lying-{damage.__name__}")
    damage(target)
    before = resident_memory()
    status, kind, message = api.error(api.load("bad", target.name))
    assert resident_memory() - before < BYTES
    assert (status, kind) == (422, DAMAGE[damage])
    assert files.SAFETENSORS in message
    assert "bad" not in api.models()


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bombs_are_refused(api: Api, bomb: str) -> None:
    """What they ask for would take for ever, and more memory than there is."""
    target = copy_adapter("lora", api.root / f"bomb-{bomb.replace(' ', '-')}")
    write(target, BOMBS[bomb], {})
    before = resident_memory()
    assert api.error(api.load("bad", target.name))[:2] == (422, "corrupt_file")
    assert resident_memory() - before < BYTES


def test_files_that_are_swapped_while_they_are_read_never_become_a_hybrid(clean: Api) -> None:
    """One adapter's config with another's weights would be a third that nobody trained."""
    target = clean.root / "swapped"
    others = [copy_adapter("dora", clean.root.parent / f"other-{n}") for n in range(2)]
    edit_config(others[1], lora_alpha=64)
    tensors = load_file(others[1] / files.SAFETENSORS)
    negated = {name: -value if "lora_B" in name else value for name, value in tensors.items()}
    save_file(negated, others[1] / files.SAFETENSORS)
    whole = {formats.read(other).digest for other in others}
    done = threading.Event()

    def swap() -> None:
        """By whole directories: what lies there is never half of each."""
        for turn in itertools.count():
            others[turn % 2].rename(target)
            if done.is_set():
                return
            time.sleep(0.002)
            target.rename(others[turn % 2])

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        answers = [clean.load("m", "swapped", load_inplace=True) for _ in range(40)]
    finally:
        done.set()
        thread.join()
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["digest"] in whole
        else:
            assert clean.error(answer)[1] in ("source_changed", "adapter_not_found")
    assert any(answer.status_code == 409 for answer in answers)
    assert clean.load("m", "swapped", load_inplace=True).status_code == 200


@pytest.mark.parametrize(("case", "value"), [("lora", 1e18), ("mola", 1e25)])
def test_weights_that_overflow_spoil_no_answer_but_their_own(
    clean: Api, case: str, value: float
) -> None:
    """Every block of the KV cache has been theirs when the others are asked again."""
    folder = copy_adapter(case, clean.root / f"overflows-{case}")
    tensors = torch.load(folder / files.PICKLE, weights_only=True)
    (folder / files.PICKLE).unlink()
    huge = {name: torch.full(tensor.shape, value) for name, tensor in tensors.items()}
    save_file(huge, folder / files.SAFETENSORS)
    prompt = list(range(3, 90))
    before = [clean.greedy(name, prompt) for name in ("tiny", "started")]
    assert clean.load("m", folder.name).status_code == 200
    prompts = [[(7 + j) * i % 500 + 3 for i in range(1900)] for j in range(24)]
    clean.complete("m", prompts, 1)
    for name, answer in zip(("tiny", "started"), before, strict=True):
        assert clean.greedy(name, prompt) == answer
