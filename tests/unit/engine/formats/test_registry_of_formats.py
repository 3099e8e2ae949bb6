"""A format is one reader in the list: all that looks for adapters knows its files from there."""

import dataclasses
import json
from importlib import import_module
from pkgutil import iter_modules

import pytest
from safetensors.torch import save_file

from molehill.api.sources import fetch
from molehill.api.sources.roots import AdapterRoots
from molehill.api.sources.watcher import Watcher
from molehill.engine import formats
from molehill.engine.adapter.errors import AdapterNotFoundError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native, readers, registry
from molehill.engine.formats.convert import isolation
from molehill.engine.formats.readers import mixes, peft
from molehill.engine.formats.readers.reader import FileNames, Reader
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant

SITE = "layers.0.mlp.up_proj"


def read_toy(toy):
    weights = toy.weights
    pair = Experts(weights.tensor("a", 2), weights.tensor("b", 2), (toy.config.integer("rank"),))
    return Adapter("toy", {SITE: LinearMixture(pair, Constant((1.0,)))}, None)


TOY = Reader(
    FileNames("toy.json", ("toy.safetensors", "toy.pt")),
    read_toy,
    no_layout="toys have no fused experts",
)


@pytest.fixture
def toy(monkeypatch, golden, tmp_path):
    """A directory in a format that is known by the list alone; its tensors are a golden case's."""
    monkeypatch.setattr(registry, "READERS", (*registry.READERS, TOY))
    experts = formats.read(golden / "cases" / "lora").sites["layers.0.self_attn.q_proj"].experts
    directory = tmp_path / "root" / "toy"
    directory.mkdir(parents=True)
    (directory / "toy.json").write_text(json.dumps({"rank": experts.ranks[0]}))
    save_file({"a": experts.a, "b": experts.b}, directory / "toy.safetensors")
    return directory, experts


def test_a_format_of_the_list_is_read(toy):
    directory, experts = toy
    adapter = formats.read(directory)
    assert adapter.kind == "toy"
    assert adapter.sites[SITE].experts.a.equal(experts.a)
    with pytest.raises(UnsupportedError, match="none, as toys have no fused experts"):
        formats.read(directory, lora_b_layout="rank_major")


def test_a_format_of_the_list_may_be_part_of_a_mix(toy):
    directory, _ = toy
    mix = {"kind": "mix", "adapters": {"toy": 0.5}}
    (directory.parent / mixes.CONFIG).write_text(json.dumps(mix))
    assert list(formats.read(directory.parent).sites) == [SITE]


def test_a_format_of_the_list_is_found_in_a_root(toy):
    directory, _ = toy
    roots = AdapterRoots([directory.parent])
    watcher = Watcher(roots, fetch.Sources(roots), registry=None)
    assert list(watcher._marks()) == ["toy"]


def test_the_files_of_a_format_of_the_list_are_fetched(toy, tmp_path):
    directory, _ = toy
    target = tmp_path / "target"
    target.mkdir()
    fetch.download_from_url(directory.as_uri(), target, limit=1 << 20)
    assert {path.name for path in target.iterdir()} == {"toy.json", "toy.safetensors"}
    with pytest.raises(AdapterNotFoundError) as caught:
        fetch.layout("hub", lambda name: name == "toy.pt")
    assert caught.value.expected == (
        "molehill.json with molehill.safetensors or adapter_config.json with "
        "adapter_model.safetensors or xlora_config.json with xlora_classifier.safetensors or "
        "toy.json with toy.safetensors or adapter_config.json with "
        "adapter_model.safetensors.index.json"
    )


def test_pickles_of_a_format_of_the_list_are_read_apart(toy):
    directory, _ = toy
    assert not isolation.is_pickled(directory)
    (directory / "toy.pt").touch()
    assert isolation.is_pickled(directory)
    assert isolation.is_pickled(directory.parent)


def test_a_peft_type_of_the_list_is_known(monkeypatch, golden, edited):
    taught = dataclasses.replace(peft.READER, peft_types=("NEW",))
    monkeypatch.setattr(registry, "READERS", (*registry.READERS, taught))
    assert registry.peft_types()[-1] == "NEW"
    adapter = formats.read(edited("lora", {"peft_type": "NEW"}))
    assert adapter.digest == formats.read(golden / "cases" / "lora").digest


def test_every_reader_is_in_the_list():
    modules = [
        import_module(f"{readers.__name__}.{module.name}")
        for module in iter_modules(readers.__path__)
    ]
    declared = {module.READER for module in modules if hasattr(module, "READER")}
    assert declared | {native.READER} == set(registry.READERS)
