"""gpt-oss: its attention and head, its router, and its experts, which have biases and hold their
weights as [in, out] with gate and up in turn."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.broken import refusal
from support.fused_experts import FUSED, TOKENS, logits_of, save_peft

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits, Moe
from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model

LOGITS = 1e-4
WEIGHTS = "adapter_model.safetensors"
STEM = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def model(path):
    return tiny_models.load(path)


@pytest.fixture(scope="module")
def base(path):
    return base_model(path)


def check(model, base, directory, expected):
    """The adapter, which gives PEFT's logits."""
    adapter = formats.read(directory, base=base)
    assert problems(adapter, base, Limits()) == []
    assert (logits_of(model, TOKENS) - expected).abs().max() > 0.1
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=LOGITS)
    return adapter


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_its_attention_gives_pefts_logits(model, base, tmp_path, options):
    expected = save_peft(model, tmp_path, target_modules=["q_proj", "o_proj"], **options)
    adapter = check(model, base, tmp_path, expected)
    assert len(adapter.biases) == (4 if options else 0)


@pytest.mark.parametrize("case", FUSED)
def test_its_experts_give_pefts_logits(model, base, tmp_path, case):
    expected = save_peft(model, tmp_path, target_modules=["q_proj"], **FUSED[case])
    adapter = check(model, base, tmp_path, expected)
    assert "layers.1.mlp.experts.3" in {site.rpartition(".")[0] for site in adapter.sites}


@pytest.mark.parametrize(
    ("parameters", "site"),
    [
        (None, "layers.0.self_attn.o_proj"),
        (["mlp.router.weight", *FUSED["both"]["target_parameters"]], "layers.0.mlp.gate"),
    ],
)
def test_all_linear_is_its_attention_and_parameters_may_be_its_router(
    model, base, tmp_path, parameters, site
):
    options = {"target_modules": "all-linear", "target_parameters": parameters}
    expected = save_peft(model, tmp_path, **options)
    assert site in check(model, base, tmp_path, expected).sites


@pytest.mark.parametrize("case", ["both", "gate and up", "down"])
def test_files_by_a_transformers_that_does_not_say_is_transposed(
    model, base, tmp_path, monkeypatch, case
):
    """PEFT then takes the axes the other way round; no version says so."""
    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp.experts, "is_transposed", False)
    monkeypatch.setattr(model.config, "_experts_implementation", "eager")
    expected = save_peft(model, tmp_path, target_modules=["q_proj"], **FUSED[case])
    monkeypatch.undo()
    name = f"{STEM}.lora_A.weight"
    assert load_file(tmp_path / WEIGHTS)[name].shape[1] in (64, 192)
    check(model, base, tmp_path, expected)


@pytest.mark.parametrize("version", ["0.17.1", "0.21.0", None])
def test_the_version_of_peft_says_nothing(model, base, tmp_path, version):
    expected = save_peft(model, tmp_path, target_modules=["q_proj"], **FUSED["both"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    text = json.dumps({**config, "peft_version": version})
    (tmp_path / "adapter_config.json").write_text(text)
    check(model, base, tmp_path, expected)


def test_without_the_base_the_order_of_gate_and_up_is_not_known(model, tmp_path):
    save_peft(model, tmp_path, target_modules=["q_proj"], **FUSED["both"])
    error = refusal(UnsupportedError, tmp_path)
    assert error.where == "adapter_config.json: target_parameters"
    assert error.found.endswith("which may have gate and up in turn")


def test_a_pair_of_other_widths(model, base, tmp_path):
    save_peft(model, tmp_path, target_modules=["q_proj"], **FUSED["down"])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{STEM}.lora_A.weight"] = torch.ones(12, 95)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ShapeError) as error:
        formats.read(tmp_path, base=base)
    assert error.value.expected == "gate_up_proj from 64 to 192, down_proj from 96 to 64"


def test_the_base_knows_its_blocks(base):
    sizes = Moe(experts=4, hidden=64, intermediate=96, interleaved=True)
    assert base.moes == {f"layers.{i}.mlp": sizes for i in range(2)}
    assert base.refused == {}
    assert base.linears["layers.1.mlp.gate"] == (64, 4)


def test_another_activation_than_vllm_computes_is_refused(path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, swiglu_limit=5.0)
    refused = base_model(config).refused
    assert set(refused) == {f"layers.{i}.mlp.experts" for i in range(2)}
    assert "swiglu" in refused["layers.0.mlp.experts"]
