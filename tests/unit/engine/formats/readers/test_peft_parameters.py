"""Adapters on the experts of mixture-of-experts bases: names, files, the reference, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.fused_experts import FUSED, LOGITS, TOKENS, check_oracle, logits_of, save_peft
from support.golden import Case
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter import expert_sites
from molehill.engine.adapter.base_model import Limits, Moe
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import problems
from molehill.engine.formats import native
from molehill.engine.formats.io import files
from molehill.engine.formats.readers import peft
from molehill.engine.formats.readers.patterns import Patterns
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, Soft, TopK

SITE = "layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-moe", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny(golden):
    return base_model(golden / "tiny-moe")


def test_the_base_is_the_oracles(model):
    check_oracle(model, Case("drlora-base"))


@pytest.mark.slow
def test_unequal_ranks_on_experts_are_the_oracles(model):
    case = Case("drlora")
    with attach(model, formats.read(case.path)):
        check_oracle(model, case)
    check_oracle(model, Case("drlora-base"))


@pytest.mark.slow
def test_mixtrals_names_are_the_oracles(oracles):
    directory = oracles / "drlora-peft-1"
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    adapter = formats.read(directory)
    assert "layers.0.mlp.experts.0.gate_proj" in adapter.sites
    assert problems(adapter, base_model(directory / "base"), Limits()) == []
    tensors = load_file(directory / "oracle.safetensors")
    prompts = json.loads((directory / "oracle.json").read_text())["prompts"]
    with attach(model, adapter):
        for i, prompt in enumerate(prompts):
            tokens = list(prompt["prompt_token_ids"])
            expected = tensors[f"prompt{i}.logits_last"]
            torch.testing.assert_close(logits_of(model, tokens)[-1], expected, rtol=0, atol=LOGITS)
            for token in prompt["greedy_token_ids"]:
                assert int(logits_of(model, tokens)[-1].argmax()) == token
                tokens.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("attention", [[], ["q_proj", "o_proj"]], ids=["alone", "attention"])
def test_fused_experts_saved_by_peft_give_pefts_logits(model, tiny, tmp_path, name, attention):
    expected = save_peft(model, tmp_path, target_modules=attention, **FUSED[name])
    adapter = formats.read(tmp_path)
    assert problems(adapter, tiny, Limits()) == []
    assert (expected - logits_of(model, TOKENS)).abs().max() > 0.1
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=LOGITS)


@pytest.fixture
def fused(model, tmp_path):
    """A saved adapter on fused experts, to be broken: its config and tensors."""
    save_peft(model, tmp_path, target_modules=[], **FUSED["both"])
    return Broken(tmp_path)


class Broken:
    def __init__(self, directory):
        self.directory = directory
        self.config = json.loads((directory / "adapter_config.json").read_text())
        self.tensors = load_file(directory / "adapter_model.safetensors")

    def refusal(self, kind):
        (self.directory / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.directory / "adapter_model.safetensors")
        return refusal(kind, self.directory)


STEM = "base_model.model.model.layers.1.mlp.experts"


def test_fused_experts_without_one_of_the_pairs(fused):
    for half in "AB":
        del fused.tensors[f"{STEM}.base_layer.lora_{half}.weight"]
    error = fused.refusal(MissingTensorError)
    assert (error.found, error.where.split(": ")[1]) == ("1 pairs", "model.layers.1.mlp.experts")


def test_fused_experts_without_one_half(fused):
    del fused.tensors[f"{STEM}.lora_B.weight"]
    assert f"{STEM}.lora_B.weight" in fused.refusal(MissingTensorError).where


def test_fused_experts_that_the_config_does_not_name(fused):
    fused.config["target_parameters"] = None
    assert fused.refusal(UnsupportedError).found == "tensors of fused experts"


def test_fused_experts_that_the_file_does_not_hold(fused):
    fused.tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 64),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 3),
    }
    fused.config["target_modules"] = ["q_proj"]
    assert "down_proj" in fused.refusal(MissingTensorError).expected


def test_fused_experts_of_another_rank(fused):
    fused.config["r"] = 5
    assert "rank 5" in fused.refusal(ShapeError).expected


def test_fused_pairs_that_fit_no_ffn(fused):
    name = f"{STEM}.base_layer.lora_B.weight"
    fused.tensors[name] = fused.tensors[name][:-2].contiguous()
    assert "pairs of gate_up_proj and down_proj" in fused.refusal(ShapeError).expected


@pytest.mark.parametrize("value", [["mlp.gate.bias"], ["self_attn.sinks"]])
def test_other_parameters_are_refused(fused, value):
    fused.config["target_parameters"] = value
    assert fused.refusal(UnsupportedError).found == value[0]


def test_fused_experts_in_a_mix(fused):
    config = files.read_config(fused.directory)
    weights = files.read_weights(fused.directory, Limits())
    with pytest.raises(UnsupportedError, match="fused experts of the base model in a mix"):
        peft.factors(config, weights)


def test_target_parameters_of_the_wrong_type(fused):
    fused.config["target_parameters"] = "mlp.experts.down_proj"
    assert "target_parameters" in fused.refusal(ConfigError).where


def test_a_native_copy_is_the_same_adapter(tmp_path):
    adapter = formats.read(Case("drlora").path)
    native.write(adapter, tmp_path / "copy")
    copy = formats.read(tmp_path / "copy")
    assert copy.digest == adapter.digest
    assert copy.sites.keys() == adapter.sites.keys()


def test_ranks_and_scalings_are_the_files(golden):
    sites = formats.read(golden / "cases" / "drlora").sites
    assert sites["layers.0.mlp.experts.3.up_proj"].experts.ranks == (8,)
    assert sites["layers.1.mlp.experts.1.down_proj"].experts.ranks == (3,)
    raw = load_file(golden / "cases" / "drlora" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts.1.down_proj"
    b = raw[f"{stem}.lora_B.weight"].float() * (9 / 3)
    assert torch.equal(sites["layers.1.mlp.experts.1.down_proj"].experts.b, b)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.block_sparse_moe.experts.3.w1", "layers.0.mlp.experts.3.gate_proj"),
        ("layers.0.block_sparse_moe.experts.3.w2", "layers.0.mlp.experts.3.down_proj"),
        ("layers.0.block_sparse_moe.experts.3.w3", "layers.0.mlp.experts.3.up_proj"),
        ("layers.0.mlp.experts.3.up_proj", "layers.0.mlp.experts.3.up_proj"),
        ("layers.0.block_sparse_moe.experts", "layers.0.mlp.experts"),
        ("layers.0.mlp.w1", "layers.0.mlp.w1"),
    ],
)
def test_canonical_names(name, expected):
    assert expert_sites.canonical(name) == expected


def test_two_spellings_of_one_expert(fused):
    fused.config["target_parameters"] = None
    fused.config["target_modules"] = ["gate_proj", "w1"]
    fused.tensors = {
        f"base_model.model.model.layers.0.{name}.lora_{half}.weight": torch.ones(shape)
        for name in ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1")
        for half, shape in (("A", (3, 64)), ("B", (48, 3)))
    }
    assert "two spellings" in fused.refusal(CorruptFileError).found


def test_the_base_knows_its_blocks(tiny):
    assert tiny.moes == {f"layers.{i}.mlp": Moe(4, 64, 48) for i in range(2)}
    assert tiny.linear("layers.1.mlp.experts.3.up_proj") == (64, 48)
    assert tiny.linear("layers.1.mlp.experts.3.down_proj") == (48, 64)
    for site in ("layers.1.mlp.experts.4.up_proj", "layers.1.mlp.experts.0.w1", "layers.1.mlp.up"):
        assert tiny.linear(site) is None


def pair(inputs, outputs):
    return Experts(torch.ones(2, inputs), torch.ones(outputs, 2), (2,))


def problem(mixture, base, site=SITE):
    (result,) = problems(Adapter("test", {site: mixture}), base, Limits())
    return result


def test_an_expert_that_the_base_lacks(tiny):
    site = "layers.1.mlp.experts.4.up_proj"
    result = problem(LinearMixture(pair(64, 48), Constant((1.0,))), tiny, site)
    assert isinstance(result, UnknownTargetError)
    assert "layers.1.mlp.experts.0.up_proj" in result.expected


def test_an_expert_of_another_width(tiny):
    result = problem(LinearMixture(pair(64, 47), Constant((1.0,))), tiny)
    assert isinstance(result, ShapeError)
    assert (result.where, result.expected) == (f"{SITE}.b", "[48, 2]")


def test_a_router_on_an_expert(tiny):
    site_experts = Experts(torch.ones(2, 64), torch.ones(48, 2), (1, 1))
    result = problem(LinearMixture(site_experts, Soft(), torch.ones(2, 64)), tiny)
    assert isinstance(result, UnsupportedError)
    assert result.found == "a router on an expert of the base model"


def test_a_static_mix_on_an_expert_is_the_weighted_sum(model, tiny):
    """Two pairs at one site, as an adapter has beside one that is merged into the base."""
    torch.manual_seed(8)
    a, b = torch.randn(5, 64) / 8, torch.randn(48, 5) / 4
    mix = LinearMixture(Experts(a, b, (2, 3)), Constant((0.5, -2.0)))
    scaled = b * torch.tensor([0.5, 0.5, -2.0, -2.0, -2.0])
    one = LinearMixture(Experts(a, scaled, (5,)), Constant((1.0,)))
    assert problems(Adapter("mix", {SITE: mix}), tiny, Limits()) == []
    with attach(model, Adapter("lora", {SITE: one})):
        expected = logits_of(model, TOKENS)
    assert (expected - logits_of(model, TOKENS)).abs().max() > 0.1
    with attach(model, Adapter("mix", {SITE: mix})):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=1e-5)


def test_dora_on_an_expert(tiny):
    mixture = LinearMixture(pair(64, 48), Constant((1.0,)), magnitude=torch.ones(48))
    assert "DoRA" in problem(mixture, tiny).found


def test_an_ffn_mixture_on_a_block_of_experts(tiny):
    stack = Experts(torch.ones(4, 64), torch.ones(48, 4), (2, 2))
    mixture = FfnMixture({"up_proj": stack}, TopK(2), torch.ones(2, 64))
    result = problem(mixture, tiny, "layers.1.mlp")
    assert isinstance(result, UnsupportedError)
    assert result.found == "an FFN mixture on a block of 4 experts"


def test_what_the_engine_refuses_is_refused_with_its_reason(tiny):
    from dataclasses import replace

    base = replace(tiny, refused={"layers.1.mlp.experts": "CUDA graphs on this server"})
    mixture = LinearMixture(pair(64, 48), Constant((1.0,)))
    assert problem(mixture, base).found == "CUDA graphs on this server"
    elsewhere = Adapter("test", {"layers.0.mlp.experts.1.up_proj": mixture})
    assert problems(elsewhere, base, Limits()) == []


PATTERNS = {
    "layers.0.mlp.experts.1.up_proj": 1,
    "experts.1.up_proj": 2,
    "up_proj": 3,
    r"layers\.[23]\..*": 4,
    "experts.11.up_proj": 5,
    "model.layers.7.self_attn.q_proj": 6,
    "layersX5": 7,
    "layers.5": 8,
    "^model.layers.8": 9,
    r"layers\.11\.mlp\.experts\.0\.up_proj": 10,
    r"model\.layersX5": 11,
    r".*\.layers\.0\..*experts.0\.(up|down)_proj": 12,
    r"(?!.*experts)(.*\.)*q_proj": 13,
    "(x+)+up_proj": 14,
}
NAMES = [
    *(
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj"
        for i in (0, 1, 2, 11)
        for e in (0, 1, 11)
        for p in ("up", "down")
    ),
    "model.layers.7.self_attn.q_proj",
    "layers.7.self_attn.q_proj",
    "model.layersX5",
    "up_proj",
    "xup_proj",
    "model.layers.8",
]


@pytest.mark.parametrize("patterns", [PATTERNS, dict(reversed(PATTERNS.items()))])
def test_patterns_match_as_peft_matches(patterns):
    other = pytest.importorskip("peft.utils.other", reason="the dev extra is not installed")
    result = [Patterns("c", patterns).get(name, 0) for name in NAMES]
    keys = [other.get_pattern_key(patterns.keys(), name) for name in NAMES]
    assert result == [patterns.get(key, 0) for key in keys]
    assert len(set(result)) > 4
