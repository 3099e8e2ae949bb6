"""`molehill convert`, and the format that it writes as docs/format.md describes it."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden import served_path

from molehill.api.cli import convert, main
from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import CorruptFileError, LimitError, MissingTensorError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.formats.convert import isolation
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, TopK

DOCUMENT = Path(__file__).parents[4] / "docs" / "format.md"


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(argument) for argument in arguments]))


# Pickled and safetensors sources.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["mola-official", "mixlora-expert-lora", "dora"])
def test_any_format_becomes_the_native_one(golden, tmp_path, capsys, case):
    source, destination = golden / "cases" / case, tmp_path / "new" / "adapter"
    original = formats.read(source)
    assert run(source, destination) == 0
    assert sorted(p.name for p in destination.iterdir()) == [native.CONFIG, native.WEIGHTS]
    result = formats.read(destination)
    assert (result.digest, result.warnings) == (original.digest, original.warnings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"kind    {original.kind}",
        f"digest  {original.digest}",
        f"sites   {len(original.sites)}",
        f"bytes   {sum(t.numel() for _, t in original.tensors()) * 4}",
    ]
    assert lines[4:] == [f"warning {text}" for text in original.warnings]


@pytest.mark.slow
def test_json(edited, tmp_path, capsys):
    assert run(edited("mola-official", safetensors=True), tmp_path / "a", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    document = json.loads((tmp_path / "a" / native.CONFIG).read_text())
    assert report["digest"] == document["digest"]
    assert (report["kind"], report["sites"], report["problems"]) == ("mola", 8, [])
    assert report["warnings"] == document["warnings"]
    assert "top_k" in report["warnings"][0]


def test_the_native_format_is_copied(golden, tmp_path):
    native.write(formats.read(golden / "cases" / "dora"), tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert (tmp_path / "b" / native.CONFIG).read_bytes() == (
        tmp_path / "a" / native.CONFIG
    ).read_bytes()


def test_an_empty_directory_may_be_the_destination(golden, tmp_path):
    (tmp_path / "a").mkdir()
    assert run(golden / "cases" / "dora", tmp_path / "a") == 0
    assert (tmp_path / "a" / native.CONFIG).exists()


def test_a_destination_with_something_in_it_is_left_alone(golden, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("a", "file"):
        assert run(golden / "cases" / "dora", tmp_path / name) == 2
        assert capsys.readouterr().err == f"molehill convert: {tmp_path / name} exists\n"
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["a", "mine", "file"]


def test_a_destination_below_a_file(golden, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(golden / "cases" / "dora", tmp_path / "file" / "a") == 2
    assert "molehill convert: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("safetensors", [False, True])
def test_a_source_that_cannot_be_read(edited, tmp_path, capsys, safetensors):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    file = "adapter_model.safetensors" if safetensors else "adapter_model.bin"
    source = edited("lora", tensors={name: None}, safetensors=safetensors)
    assert run(source, tmp_path / "a") == 1
    message = f"{file}: {name}: found no such tensor, expected one"
    assert capsys.readouterr().err == f"MissingTensorError: {message}\n"
    assert run(source, tmp_path / "a", "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == {
        "type": "missing_tensor",
        "where": f"{file}: {name}",
        "found": "no such tensor",
        "expected": "one",
    }
    assert not (tmp_path / "a").exists()


def test_no_source(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "a") == 1
    assert capsys.readouterr().err.startswith("AdapterNotFoundError: ")


@pytest.mark.slow
def test_the_command(golden, tmp_path, capsys):
    source = str(golden / "cases" / "dora")
    assert main.main(["convert", source, str(tmp_path / "a")]) == 0
    with pytest.raises(SystemExit) as caught:
        main.main(["convert", source])
    assert caught.value.code == 2
    assert "DST" in capsys.readouterr().err


# Isolation


@pytest.mark.slow
def test_pickles_are_not_read_in_this_process(golden, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("torch.load was called here")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CorruptFileError, match=r"torch\.load was called here"):
        formats.read(golden / "cases" / "hydralora")
    assert run(golden / "cases" / "hydralora", tmp_path / "a") == 0


def test_pickles_are_found(golden, tmp_path):
    assert isolation.is_pickled(golden / "cases" / "lora")
    assert not isolation.is_pickled(golden / "cases" / "dora")
    (tmp_path / "0").mkdir()
    shutil.copy(golden / "cases" / "lora" / "adapter_model.bin", tmp_path / "0")
    assert isolation.is_pickled(tmp_path)


@pytest.mark.slow
def test_errors_and_limits_cross_the_processes(golden, edited):
    with pytest.raises(LimitError) as caught:
        isolation.read_isolated(golden / "cases" / "hydralora", Limits(experts=2))
    assert (caught.value.found, caught.value.expected) == ("experts 3", "at most 2")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    with pytest.raises(MissingTensorError) as missing:
        isolation.read_isolated(edited("hydralora", tensors={name: None}))
    assert missing.value.where == f"adapter_model.bin: {name}"


def test_a_reader_that_dies_is_an_error(golden, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os\nos.kill(os.getpid(), {signal.SIGSEGV:d})\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    with pytest.raises(CorruptFileError, match=f"status {-signal.SIGSEGV:d}"):
        isolation.read_isolated(golden / "cases" / "lora")


# docs/format.md


def example():
    def ones(experts, inputs, outputs):
        rows = 2 * experts
        return Experts(torch.ones(rows, inputs), torch.ones(outputs, rows), (2,) * experts)

    ffn = {"gate_proj": ones(3, 4, 6), "down_proj": ones(3, 6, 4)}
    sites = {
        "layers.0.self_attn.q_proj": LinearMixture(ones(1, 4, 4), Constant((1.0,))),
        "layers.0.mlp": FfnMixture(ffn, TopK(2), torch.ones(3, 4)),
    }
    return Adapter("mixlora", sites, "my-org/my-base")


def test_the_documents_example_is_what_is_written(tmp_path):
    native.write(example(), tmp_path / "a")
    text = DOCUMENT.read_text()
    block, *_ = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads((tmp_path / "a" / native.CONFIG).read_text()) == json.loads(block)
    rows = dict(re.findall(r"^\| `(layers[\w.]+)` \| (\[\d+, \d+\]) \|$", text, re.MULTILINE))
    written = load_file(tmp_path / "a" / native.WEIGHTS)
    assert {name: str(list(tensor.shape)) for name, tensor in written.items()} == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["mixlora-expert-lora", "dora", "dynmole-k1", "mola-official", "mov", "flylora", "goat"],
)
def test_the_digest_is_what_the_document_says(tmp_path, case):
    native.write(formats.read(served_path(case)), tmp_path / "a")
    document = json.loads((tmp_path / "a" / native.CONFIG).read_text())
    tensors = load_file(tmp_path / "a" / native.WEIGHTS)
    described = {name: document[name] for name in ("kind", "sites")}
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors, key=documented_order):
        sha.update(b"\0" + name.encode() + str(list(tensors[name].shape)).encode())
        sha.update(tensors[name].numpy().astype("<f4").tobytes())
    assert document["digest"] == sha.hexdigest()


def documented_order(name):
    """(layer, site, [projection,] part) of a Llama's tensor."""
    _, layer, *site, part = name.split(".")
    if site[-1] == "shared":
        part = f"{site.pop()}.{part}"
    parts = ("router", "parameters", "magnitude", "a", "b", "shared.a", "shared.b", "vectors")
    place = parts.index(part)
    ffn = site[0] == "mlp" and len(site) == 2
    if site[0] == "mlp" and (ffn or part == "router"):
        return int(layer), "mlp", site[1] if ffn else "", place
    return int(layer), ".".join(site), "", place
