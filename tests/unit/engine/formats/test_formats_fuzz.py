"""Adapter directories of every format, with one thing or two changed, through all that a load does.

What comes out is an AdapterError, or an adapter that can be stored, planned and merged.
"""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.examples import examples
from support.golden import GOLDEN, SERVED, TINY_LLAMA

from molehill.engine import formats
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.formats.io import files
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge import merge_static
from molehill.engine.transform.plan import plan

WORDS = ["LORA", "MIXLORA", "mola", "soft", "renyi", "tsallis", "all", "none", "q_proj", "up_proj"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=6),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from([*WORDS, "", "layers.0", ".*", "(a+)+"]), SCALARS, max_size=2),
)


def places(value, path=()):
    """Every path into a JSON value but the empty one."""
    children: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for name, child in children:
        yield (*path, name)
        yield from places(child, (*path, name))


def put(document, path, value):
    *parents, last = path
    for name in parents:
        document = document[name]
    document[last] = value


# One change to a tensor: what becomes of it, None drops it.
CHANGES = {
    "dropped": lambda t: None,
    "transposed": lambda t: t.movedim(0, -1) if t.ndim else t,
    "without a row": lambda t: t.flatten()[1:] if t.ndim < 2 else t[1:],
    "doubled": lambda t: torch.cat([t.flatten(), t.flatten()]) if t.ndim < 2 else torch.cat([t, t]),
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t.flatten()[:0],
    "a number": lambda t: t.flatten()[0],
    "deeper": lambda t: t[None],
    "zero": torch.zeros_like,
    "huge": lambda t: torch.full_like(t, 6e4),
    "nan": lambda t: torch.full_like(t, torch.nan),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double() * 1e200,
    "int8": lambda t: t.to(torch.int8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}
# One change to a name.
RENAMES = {
    "another layer": lambda name: re.sub(r"layers\.\d+", "layers.7", name),
    "another expert": lambda name: re.sub(r"experts\.\d+", "experts.9", name),
    "the other half": lambda name: name.replace("lora_A", "lora_B"),
    "another projection": lambda name: re.sub(r"[qkvo]_proj", "up_proj", name),
    "a longer number": lambda name: re.sub(r"\d+", lambda m: m[0] * 300, name),
    "a suffix": lambda name: f"{name}.weight",
    "nothing": lambda name: "",
    "another alphabet": lambda name: name.replace("o", "\N{GREEK SMALL LETTER OMICRON}"),
}
TENSOR_CHANGE = st.tuples(
    st.integers(0, 2**16), st.sampled_from([*CHANGES, *RENAMES]), st.booleans()
)


@pytest.fixture(scope="module")
def base():
    return base_model(TINY_LLAMA)


@pytest.fixture(scope="module")
def originals():
    """By case: the config, and the tensors of a pickle or of safetensors."""
    result = {}
    for case in SERVED:
        folder = GOLDEN / "cases" / case
        config = json.loads((folder / files.CONFIG).read_text())
        # Some formats have a tensor twice, which safetensors does not save.
        result[case] = (
            config,
            {name: t.detach().clone() for name, t in read_tensors(folder).items()},
        )
    return result


def read_tensors(directory: Path):
    if (directory / files.SAFETENSORS).exists():
        return load_file(directory / files.SAFETENSORS)
    return torch.load(directory / files.PICKLE, weights_only=True)


def go_through(config, tensors, base) -> None:
    """All that the server and its workers do with an adapter before they serve it."""
    with TemporaryDirectory() as name:
        directory = Path(name) / "adapter"
        directory.mkdir()
        (directory / files.CONFIG).write_text(json.dumps(config))
        save_file(tensors, directory / files.SAFETENSORS)
        try:
            adapter = formats.read(directory)
            validate(adapter, base, formats.DEFAULT_LIMITS)
        except AdapterError as error:
            json.dumps([error.where, error.found, error.expected], ensure_ascii=False).encode()
            return
        stored = Path(name) / adapter.digest
        native.write(adapter, stored)
        again = native.read(stored, formats.DEFAULT_LIMITS)
        assert again.digest == adapter.digest
        assert len(plan(again)) == len(adapter.sites)
        merge_static(again, base, 0.0)


FUZZ = settings(deadline=None, derandomize=True)


@pytest.mark.slow
@settings(FUZZ, max_examples=examples(100))
@given(
    case=st.sampled_from(SERVED),
    changes=st.lists(st.tuples(st.integers(0, 2**16), VALUES), min_size=1, max_size=2),
)
def test_a_config_with_other_fields(originals, base, case, changes):
    config, tensors = copy.deepcopy(originals[case])
    for where, value in changes:
        paths = list(places(config))
        put(config, paths[where % len(paths)], value)
    go_through(config, tensors, base)


@pytest.mark.slow
@settings(FUZZ, max_examples=examples(100))
@given(case=st.sampled_from(SERVED), changes=st.lists(TENSOR_CHANGE, min_size=1, max_size=2))
def test_other_tensors(originals, base, case, changes):
    """of_all: every tensor that has the same name in its place, not just one."""
    config, original = originals[case]
    tensors = dict(original)
    for where, change, of_all in changes:
        chosen = sorted(tensors)[where % len(tensors)] if tensors else ""
        alike = chosen.partition(".layers.")[2].partition(".")[2] or chosen
        for name in [
            value for value in tensors if value == chosen or (of_all and value.endswith(alike))
        ]:
            tensor = tensors.pop(name)
            changed = CHANGES[change](tensor) if change in CHANGES and tensor.numel() else tensor
            if changed is not None:
                tensors[RENAMES.get(change, str)(name)] = changed
    go_through(config, {name: value.clone().contiguous() for name, value in tensors.items()}, base)
