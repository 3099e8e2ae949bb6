"""DoRA on the experts inside an FFN: the file, and the reference against PEFT's own DoRA layers."""

import copy
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from support import dora_experts
from transformers import AutoModelForCausalLM, LlamaConfig

from molehill.engine import formats
from molehill.engine.adapter.errors import MissingTensorError, ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach

TOKENS = torch.tensor([[303, 316, 288, 262, 352, 17, 5]])
MAGNITUDE = "mixlora.layers.1.mlp.up_proj.experts.2.lora_magnitude_vector"


def biased():
    """A tiny Llama with biases in its FFNs, which DoRA's magnitudes spare."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mlp_bias=True,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def plain(golden):
    source = golden / "tiny-llama"
    return {
        "golden": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        "biased": biased(),
    }


@pytest.fixture(scope="module")
def oracles(plain):
    return {name: dora_experts.make(copy.deepcopy(model)) for name, model in plain.items()}


@pytest.fixture
def directory(oracles, tmp_path):
    return oracles["golden"].save(tmp_path / "dora")


@torch.no_grad()
@pytest.mark.parametrize("name", ["golden", "biased"])
def test_the_reference_gives_pefts_logits(plain, oracles, tmp_path, name):
    model, oracle = plain[name], oracles[name]
    adapter = formats.read(oracle.save(tmp_path / name))
    expected = oracle.model(TOKENS).logits
    scale = expected.std()
    with attach(model, adapter):
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=2e-4 * scale)
    # What the magnitudes do is not lost in the tolerance.
    sites = {
        site: cast(Any, type(mixture))(mixture.experts, mixture.policy, mixture.router)
        for site, mixture in adapter.sites.items()
    }
    with attach(model, Adapter("mixlora", sites)):
        assert (model(TOKENS).logits - expected).abs().max() > 0.05 * scale


def test_magnitudes_are_read_and_those_not_saved_are_warned_of(directory, oracles):
    adapter = formats.read(directory)
    site = adapter.sites["layers.1.mlp"]
    assert sorted(site.magnitudes) == ["gate_proj", "up_proj"]
    result = oracles["golden"].tensors[MAGNITUDE]
    assert torch.equal(site.magnitudes["up_proj"][2], result)
    (warning,) = adapter.warnings
    assert "no magnitudes are saved for layers.0.mlp.down_proj and 3 more" in warning


def test_the_native_format_keeps_the_magnitudes(directory, tmp_path):
    adapter = formats.read(directory)
    native.write(adapter, tmp_path / "native")
    again = formats.read(tmp_path / "native")
    assert again.digest == adapter.digest
    names = {name for name, _ in again.tensors()}
    assert "layers.0.mlp.gate_proj.magnitude" in names


def down(tensors):
    for i in range(4):
        for e in range(dora_experts.EXPERTS):
            name = f"mixlora.layers.{i}.mlp.down_proj.experts.{e}.lora_magnitude_vector"
            tensors[name] = torch.ones(64)


def drop(tensors):
    del tensors[MAGNITUDE]


def cut(tensors):
    tensors[MAGNITUDE] = tensors[MAGNITUDE][1:].contiguous()


def stray(tensors):
    tensors[MAGNITUDE.replace("experts.2", "experts.7")] = torch.ones(176)


@pytest.mark.parametrize(
    ("change", "kind", "where", "message"),
    [
        (down, UnsupportedError, "layers.0.mlp.down_proj.magnitude", "once per expert"),
        (drop, MissingTensorError, MAGNITUDE, "no such tensor"),
        (cut, ShapeError, MAGNITUDE, "[175]"),
        (stray, UnsupportedError, "experts.7.lora_magnitude_vector", "a DoRA magnitude"),
    ],
)
def test_magnitudes_that_cannot_be_served(directory, oracles, change, kind, where, message):
    tensors = dict(oracles["golden"].tensors)
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(kind) as caught:
        formats.read(directory)
    assert where in caught.value.where
    assert message in caught.value.found


def test_magnitudes_without_use_dora(directory):
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(UnsupportedError, match="without use_dora"):
        formats.read(directory)
