"""The native format holds what it is read for, field by field, and nothing else."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from psutil import virtual_memory
from safetensors.torch import load_file, save_file
from support.examples import examples

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    AdapterError,
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.engine.formats.io import files

CASES = ("dora", "mixlora-expert-lora", "dynmole-renyi", "mola-official", "mov")


@pytest.fixture(scope="module")
def stored(golden, tmp_path_factory):
    """A directory with each case in the native format, not to be changed."""
    root = tmp_path_factory.mktemp("native")
    for case in CASES:
        native.write(formats.read(golden / "cases" / case), root / case)
    return root


@pytest.fixture
def rewritten(stored, tmp_path):
    """`rewritten(case, change)`: a copy after `change(document, tensors)`."""

    def rewrite(case, change):
        document = json.loads((stored / case / native.CONFIG).read_text())
        tensors = load_file(stored / case / native.WEIGHTS)
        change(document, tensors)
        directory = tmp_path / "rewritten"
        directory.mkdir()
        (directory / native.CONFIG).write_text(json.dumps(document))
        save_file(tensors, directory / native.WEIGHTS)
        return directory

    return rewrite


@pytest.mark.parametrize("case", CASES)
def test_a_worker_reads_its_own_copy_as_everybody_reads_it(stored, case):
    adapter, read = native.read_stored(stored / case), formats.read(stored / case)
    assert adapter == dataclasses.replace(read, sites=adapter.sites)
    assert adapter.digest == read.digest
    assert [name for name, _ in adapter.tensors()] == [name for name, _ in read.tensors()]
    for (_, answers), (_, theirs) in zip(adapter.tensors(), read.tensors(), strict=True):
        assert answers.equal(theirs)


def test_a_copy_that_somebody_touched_is_refused_by_the_worker_too(stored, tmp_path):
    def touched(change):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(stored / CASES[0], directory)
        change(directory)
        return directory

    def flip(directory):
        data = bytearray((directory / native.WEIGHTS).read_bytes())
        data[-1] ^= 1
        (directory / native.WEIGHTS).write_bytes(data)

    def cut(directory):
        data = (directory / native.WEIGHTS).read_bytes()
        (directory / native.WEIGHTS).write_bytes(data[: len(data) // 2])

    def empty(directory):
        (directory / native.WEIGHTS).write_bytes(b"")

    def remove(directory):
        (directory / native.WEIGHTS).unlink()

    def lie(directory):
        (directory / native.CONFIG).write_text('{"kind": "lora", "digest": "0", "sites": 3}')

    for change in (flip, cut, empty, remove, lie):
        with pytest.raises(CorruptFileError):
            native.read_stored(touched(change))


def test_the_worker_says_which_file_is_too_short(stored, tmp_path):
    shutil.copytree(stored / CASES[0], tmp_path / "copy")
    weights = tmp_path / "copy" / native.WEIGHTS
    size = weights.stat().st_size
    os.truncate(weights, size - 4)
    with pytest.raises(CorruptFileError) as caught:
        native.read_stored(tmp_path / "copy")
    assert (
        str(caught.value) == f"{native.WEIGHTS}: found {size - 4} bytes, expected at least {size}"
    )


SHORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not SHORT.exists(), reason="needs a file with fewer bytes than its size")
def test_a_file_that_ends_before_its_size_is_named_too():
    with pytest.raises(
        CorruptFileError, match=rf"enabled: found \d+ bytes, .*{SHORT.stat().st_size}"
    ):
        files.read_floats(SHORT)


@pytest.mark.slow
@pytest.mark.skipif(virtual_memory().available < 3 << 30, reason="needs 3 GiB of free memory")
def test_a_file_over_2_gib_is_read_to_its_end(tmp_path):
    """Linux reads 2 GiB less a page at once, and no more."""
    rows, width = 1 << 10, (1 << 19) + 1024
    size = 4 * rows * width
    assert size > 2**31
    fields = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}
    header = json.dumps({"a": fields}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / native.WEIGHTS
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    result = files.read_floats(path)["a"]
    assert (result.shape, result[-1, -1], result[-1, -2]) == ((rows, width), 7, 0)


K = "layers.0.self_attn.k_proj"
Q, FFN, DORA = "layers.0.self_attn.q_proj", "layers.0.mlp", "layers.0.mlp.down_proj"


def set_site(site, **values):
    return lambda d, t: d["sites"][site].update(values)


def set_routing(site, **values):
    return lambda d, t: d["sites"][site]["routing"].update(values)


def drop(*path):
    def change(d, t):
        *parents, last = path
        for name in parents:
            d = d[name]
        del d[last]

    return change


def put(name, tensor):
    return lambda d, t: t.update({name: tensor})


def both(first, second):
    return lambda d, t: (first(d, t), second(d, t))


REFUSALS = {
    "no version": ("dora", drop("format_version"), ConfigError, "format_version"),
    "version as text": ("dora", lambda d, t: d.update(format_version="1"), ConfigError, "version"),
    "version 0": ("dora", lambda d, t: d.update(format_version=0), ConfigError, "format_version"),
    "version 2": ("dora", lambda d, t: d.update(format_version=2), UnsupportedError, "version"),
    "unknown field": ("dora", lambda d, t: d.update(notes="x"), UnsupportedError, "notes"),
    "no kind": ("dora", drop("kind"), ConfigError, "kind"),
    "empty kind": ("dora", lambda d, t: d.update(kind=""), ConfigError, "kind"),
    "kind as number": ("dora", lambda d, t: d.update(kind=1), ConfigError, "kind"),
    "no digest": ("dora", drop("digest"), ConfigError, "digest"),
    "digest as list": ("dora", lambda d, t: d.update(digest=["0"]), ConfigError, "digest"),
    "no sites": ("dora", drop("sites"), UnsupportedError, "unknown tensor"),
    "sites as list": ("dora", lambda d, t: d.update(sites=[1]), ConfigError, "sites"),
    "base as list": ("dora", lambda d, t: d.update(base_model=[]), ConfigError, "base_model"),
    "warnings as text": ("dora", lambda d, t: d.update(warnings="x"), ConfigError, "warnings"),
    "warning as number": ("dora", lambda d, t: d.update(warnings=[1]), ConfigError, "warnings"),
    "site as list": ("dora", lambda d, t: d["sites"].update({Q: []}), ConfigError, Q),
    "unknown site field": ("dora", set_site(Q, bias=1), UnsupportedError, "bias"),
    "activation of a linear": (
        "dora",
        set_site(Q, activation=None),
        UnsupportedError,
        "activation",
    ),
    "unknown shape": ("dora", set_site(Q, shape="conv"), ConfigError, "shape"),
    "no routing": ("dora", drop("sites", Q, "routing"), ConfigError, "policy"),
    "routing as text": ("dora", set_site(Q, routing="Soft"), ConfigError, "routing"),
    "unknown policy field": ("dora", set_routing(Q, scale=2), ConfigError, "routing"),
    "no constant weights": ("dora", set_routing(Q, weights=[]), ConfigError, "weights"),
    "too many weights": ("dora", set_routing(Q, weights=[1.0, 1.0]), ConfigError, "weights"),
    "weight as text": ("dora", set_routing(Q, weights=["1"]), ConfigError, "weights"),
    "ranks as number": ("dora", set_site(Q, ranks=4), ConfigError, "ranks"),
    "rank 0": ("dora", set_site(Q, ranks=[4, 0]), ConfigError, "ranks"),
    "rank as real": ("dora", set_site(Q, ranks=[4.0]), ConfigError, "ranks"),
    "other ranks": ("dora", set_site(Q, ranks=[5]), ShapeError, "q_proj.a"),
    "no ranks": ("dora", set_site(Q, ranks=[]), ShapeError, "q_proj.a"),
    "unused router": ("dora", put(f"{Q}.router", torch.ones(1, 64)), UnsupportedError, "router"),
    "no router": ("mola-official", lambda d, t: t.pop(f"{Q}.router"), MissingTensorError, "router"),
    "router of one axis": (
        "mola-official",
        put(f"{Q}.router", torch.ones(2)),
        ShapeError,
        "router",
    ),
    "magnitude beside a router": (
        "mola-official",
        put(f"{Q}.magnitude", torch.ones(128)),
        UnsupportedError,
        "magnitude",
    ),
    "magnitude beside experts": (
        "dora",
        both(set_site(Q, ranks=[2, 2]), set_routing(Q, weights=[1.0, 1.0])),
        UnsupportedError,
        "magnitude",
    ),
    "square magnitude": ("dora", put(f"{Q}.magnitude", torch.ones(8, 16)), ShapeError, "magnitude"),
    "no a": ("dora", lambda d, t: t.pop(f"{Q}.a"), MissingTensorError, "q_proj.a"),
    "a of one axis": ("dora", put(f"{Q}.a", torch.ones(4)), ShapeError, "q_proj.a"),
    "no vectors": ("mov", lambda d, t: t.pop(f"{K}.vectors"), MissingTensorError, "k_proj.vectors"),
    "vectors of two axes": ("mov", put(f"{K}.vectors", torch.ones(4, 32)), ShapeError, "vectors"),
    "vectors of nothing": ("mov", drop("sites", K, "of"), ConfigError, "of"),
    "vectors of both": ("mov", set_site(K, of="both"), ConfigError, "of"),
    "ranks of vectors": ("mov", set_site(K, ranks=[4]), UnsupportedError, "ranks"),
    "constant weights of vectors": (
        "mov",
        lambda d, t: d["sites"][K].update(routing={"policy": "Constant", "weights": [1.0] * 4}),
        UnsupportedError,
        "routing",
    ),
    "magnitudes of a linear's shape": (
        "mixlora-expert-lora",
        put(f"{FFN}.up_proj.magnitude", torch.ones(176)),
        ShapeError,
        "up_proj.magnitude",
    ),
    "magnitudes without experts": (
        "mixlora-expert-lora",
        put(f"{FFN}.down_proj.magnitude", torch.ones(4, 64)),
        UnsupportedError,
        "down_proj.magnitude",
    ),
    "unknown tensor": ("dora", put("x", torch.ones(1)), UnsupportedError, "x"),
    "tensor of whole numbers": (
        "dora",
        put(f"{Q}.a", torch.ones(4, 64, dtype=torch.int64)),
        UnsupportedError,
        "q_proj.a",
    ),
    "other values": ("dora", put(f"{Q}.a", torch.ones(4, 64)), CorruptFileError, "safetensors"),
    "unknown projection": (
        "mixlora-expert-lora",
        lambda d, t: d["sites"][FFN]["ranks"].update(fc1=[2, 2, 2, 2]),
        UnsupportedError,
        "fc1",
    ),
    "ffn ranks as list": ("mixlora-expert-lora", set_site(FFN, ranks=[2]), ConfigError, "ranks"),
    "activation as number": (
        "mixlora-expert-lora",
        set_site(FFN, activation=1),
        ConfigError,
        "activation",
    ),
    "constant ffn": (
        "mixlora-expert-lora",
        set_site(FFN, routing={"policy": "Constant", "weights": [0.25] * 4}),
        UnsupportedError,
        "routing",
    ),
    "no ffn router": (
        "mixlora-expert-lora",
        lambda d, t: t.pop(f"{FFN}.router"),
        MissingTensorError,
        "router",
    ),
    "top_p above 1": (
        "dynmole-renyi",
        set_routing("layers.0.mlp.gate_proj", top_p=1.5),
        ConfigError,
        "top_p",
    ),
    "entropy of another type": (
        "dynmole-renyi",
        set_routing("layers.0.mlp.gate_proj", entropy_type="shannon"),
        ConfigError,
        "entropy_type",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(rewritten, name):
    case, change, kind, where = REFUSALS[name]
    with pytest.raises(kind) as caught:
        formats.read(rewritten(case, change))
    assert type(caught.value) is kind
    assert where in f"{caught.value.where} {caught.value.found}"


@pytest.mark.parametrize(
    ("case", "change", "where"),
    [
        ("mola-official", {"router": torch.ones(2, 9)}, f"{Q}.router"),
        ("mola-official", {"router": torch.ones(3, 64)}, f"{Q}.router"),
        ("dora", {"magnitude": torch.ones(129)}, f"{Q}.magnitude"),
        ("mixlora", {"magnitudes": {"up_proj": torch.ones(3, 176)}}, f"{FFN}.up_proj.magnitude"),
        ("mov", {"vectors": torch.ones(2, 3, 32)}, f"{K}.vectors"),
        ("mov", {"of": "input"}, f"{K}.vectors"),
    ],
)
def test_a_right_digest_of_wrong_shapes(golden, tmp_path, case, change, where):
    adapter = formats.read(golden / "cases" / case)
    name = next(name for name in (Q, K, FFN) if where.startswith(f"{name}."))
    site = dataclasses.replace(adapter.sites[name], **change)
    native.write(dataclasses.replace(adapter, sites={**adapter.sites, name: site}), tmp_path / "a")
    with pytest.raises(ShapeError) as caught:
        formats.read(tmp_path / "a")
    assert caught.value.where == where


def test_no_weights_file(rewritten):
    directory = rewritten("dora", lambda d, t: None)
    (directory / native.WEIGHTS).unlink()
    with pytest.raises(CorruptFileError, match="no such file"):
        formats.read(directory)


def test_half_precision_is_taken_where_it_loses_nothing(stored, rewritten):
    """The golden adapters' values are exact in float16; scaling by powers of 2 leaves them so."""
    digest = formats.read(stored / "dora").digest
    halve = lambda d, t: t.update({name: tensor.half() for name, tensor in t.items()})  # noqa: E731
    assert formats.read(rewritten("dora", halve)).digest == digest


# Damage

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 5), max_size=3),
)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    children: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for name, child in children:
        yield from places(child, (*path, name))


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(100))
@given(case=st.sampled_from(CASES), where=st.integers(0, 10**6), value=VALUES, remove=st.booleans())
def test_a_changed_field_gives_a_typed_error_or_the_same_adapter(
    stored, case, where, value, remove
):
    document = json.loads((stored / case / native.CONFIG).read_text())
    original = copy.deepcopy(document)
    *parents, last = (paths := list(places(document))[1:])[where % len(paths)]
    target = document
    for name in parents:
        target = target[name]
    if remove:
        del target[last]
    else:
        target[last] = value
    with TemporaryDirectory() as name, suppress(AdapterError):
        directory = Path(name)
        (directory / native.CONFIG).write_text(json.dumps(document))
        (directory / native.WEIGHTS).symlink_to(stored / case / native.WEIGHTS)
        assert formats.read(directory).digest == original["digest"]


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(100))
@given(
    file=st.sampled_from([native.CONFIG, native.WEIGHTS]),
    damage=st.lists(
        st.tuples(st.integers(0, 2**20), st.integers(0, 8), st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_bytes_give_a_typed_error_or_the_same_adapter(stored, file, damage):
    digest = json.loads((stored / "dora" / native.CONFIG).read_text())["digest"]
    with TemporaryDirectory() as name, suppress(AdapterError):
        directory = Path(name)
        for other in (native.CONFIG, native.WEIGHTS):
            data = bytearray((stored / "dora" / other).read_bytes())
            for place, length, replacement in damage if other == file else ():
                at = place % len(data)
                data[at : at + length] = replacement
            (directory / other).write_bytes(data)
        assert formats.read(directory).digest == digest
