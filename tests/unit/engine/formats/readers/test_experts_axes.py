"""LoRA on a base's experts and routers as versions of PEFT and of models have it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.fused_experts import TOKENS, check_oracle, logits_of, save_peft
from support.golden import Case
from transformers import AutoConfig, AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import ConfigError, ShapeError, UnsupportedError
from molehill.engine.adapter.expert_sites import canonical
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model

LOGITS = 1e-4
WEIGHTS = "adapter_model.safetensors"
STEM = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-moe", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny(golden):
    return base_model(golden / "tiny-moe")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["experts-peft-0.18", "moe-all-linear"])
def test_golden_cases_are_the_oracles(model, tiny, case):
    adapter = formats.read(Case(case).path)
    assert problems(adapter, tiny, Limits()) == []
    with attach(model, adapter):
        check_oracle(model, Case(case))
    check_oracle(model, Case("drlora-base"))


@torch.no_grad()
def test_from_a_position_on_it_goes_on_from_what_the_base_has_read(model):
    """The base's router up to there, and the adapted one on the base's cache from there on."""
    adapter, ids = formats.read(Case("moe-all-linear").path), torch.tensor([TOKENS])
    with attach(model, adapter, start=4):
        result = model(ids, use_cache=False).logits[0]
    read = model(ids[:, :4], use_cache=True)
    with attach(model, adapter):
        after = model(ids[:, 4:], past_key_values=read.past_key_values).logits[0]
    torch.testing.assert_close(result, torch.cat([read.logits[0], after]), rtol=0, atol=LOGITS)


def edited(case, directory, keep=lambda name: True, **fields):
    shutil.copytree(Case(case).path, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    tensors = {n: t for n, t in load_file(directory / WEIGHTS).items() if keep(n)}
    save_file(tensors, directory / WEIGHTS)
    return directory


def test_a_version_that_contradicts_the_shapes(tmp_path):
    newer = edited("experts-peft-0.18", tmp_path / "a", peft_version="0.19.0")
    error = refusal(ConfigError, newer)
    assert error.where.endswith("peft_version")
    assert error.found == "'0.19.0' beside lora_A of PEFT before 0.19"
    older = edited("experts-unsloth-grouped", tmp_path / "b", peft_version="0.18.1")
    assert refusal(ConfigError, older).found == "'0.18.1' beside lora_A of PEFT 0.19 and later"
    refusal(ConfigError, edited("experts-peft-0.18", tmp_path / "c", peft_version="new"))


def test_without_a_version_two_pairs_tell_by_their_shapes(tmp_path):
    for case in ("experts-peft-0.18", "experts-unsloth-grouped"):
        result = formats.read(edited(case, tmp_path / case, peft_version=None))
        assert result.digest == formats.read(Case(case).path).digest


def test_one_pair_by_its_version_must_fit_the_base(tiny, tmp_path):
    """gate_up_proj alone, whose shapes have no other pair to tell by."""

    def keep(name):
        return ".experts." not in name or "base_layer" in name

    fields = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    site_experts = edited("experts-peft-0.18", tmp_path / "a", keep, **fields)
    assert problems(formats.read(site_experts), tiny, Limits()) == []
    for version in ("0.21.0", None):
        other = edited("experts-peft-0.18", tmp_path / f"{version}", keep, **fields)
        config = json.loads((other / "adapter_config.json").read_text())
        text = json.dumps({**config, "peft_version": version})
        (other / "adapter_config.json").write_text(text)
        result = problems(formats.read(other), tiny, Limits())
        assert any(isinstance(problem, ShapeError) for problem in result)


def test_a_square_pair_without_a_version_is_in_doubt(tmp_path):
    def keep(name):
        return ".experts." not in name or "base_layer" in name

    fields = {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": None}
    directory = edited("experts-peft-0.18", tmp_path / "a", keep, **fields)
    tensors = load_file(directory / WEIGHTS)
    for name in [name for name in tensors if "base_layer.lora_B" in name]:
        tensors[name] = torch.ones(96, 16)
    save_file(tensors, directory / WEIGHTS)
    assert "the version of PEFT that wrote it" in refusal(ConfigError, directory).expected


def test_a_routers_weight_that_no_parameter_names(tmp_path):
    named = ["down_proj", "gate_up_proj"]
    directory = edited("moe-all-linear", tmp_path / "a", target_parameters=named)
    error = refusal(UnsupportedError, directory)
    assert error.where.endswith("layers.0.mlp.gate")


TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "decoder_sparse_step": 1,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# By model type: what PEFT adapts, linears and parameters, and a site that comes of each.
OTHERS = {
    "mixtral": (["q_proj"], [*EXPERTS, "gate.weight"], "layers.0.mlp.gate"),
    "granitemoe": (["o_proj"], [*EXPERTS, "router.weight"], "layers.0.mlp.gate"),
    "qwen2_moe": (
        ["shared_expert.down_proj", "shared_expert.gate_proj", "shared_expert_gate"],
        EXPERTS,
        "layers.0.mlp.shared_expert_gate",
    ),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_bases_experts_routers_and_shared_experts_are_pefts(tmp_path, model_type):
    linears, parameters, site = OTHERS[model_type]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    before = logits_of(model, TOKENS)
    expected = save_peft(model, tmp_path, target_modules=linears, target_parameters=parameters)
    adapter = formats.read(tmp_path)
    assert site in adapter.sites
    assert "layers.0.mlp.experts.3.up_proj" in adapter.sites
    assert problems(adapter, base_model(config), Limits()) == []
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=LOGITS)
    assert torch.equal(logits_of(model, TOKENS), before)
    assert (before - expected).abs().max() > 0.1


def test_older_granites_modules_and_gemmas_parent_are_the_same_experts(tmp_path):
    """As PEFT names them: two modules of one weight each, and both parameters on `moe`."""
    site_experts = formats.read(edited("experts-unsloth-grouped", tmp_path / "own"))
    tensors = load_file(tmp_path / "own" / WEIGHTS)
    for name, rename, parameters in (
        (
            "granite",
            lambda key: key.replace(".experts.base_layer.", ".input_linear.").replace(
                ".experts.", ".output_linear."
            ),
            ["mlp.input_linear.weight", "mlp.output_linear.weight"],
        ),
        ("gemma", lambda key: key.replace("mlp.experts", "moe"), ["moe.gate_up_proj", "down_proj"]),
    ):
        fields = {"target_parameters": parameters}
        directory = edited("experts-unsloth-grouped", tmp_path / name, **fields)
        save_file({rename(key): tensor for key, tensor in tensors.items()}, directory / WEIGHTS)
        result = formats.read(directory).sites
        block = "" if name == "gemma" else "mlp."
        for site, mixture in site_experts.sites.items():
            other = result[site.replace("mlp.experts", f"{block}experts")]
            assert torch.equal(mixture.experts.a, other.experts.a)
            assert torch.equal(mixture.experts.b, other.experts.b)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.0.block_sparse_moe.experts.3.w2", "layers.0.mlp.experts.3.down_proj"),
        ("layers.0.block_sparse_moe.router.layer", "layers.0.mlp.gate"),
        ("layers.0.mlp.router", "layers.0.mlp.gate"),
        ("layers.0.moe.experts.1.up_proj", "layers.0.experts.1.up_proj"),
        ("layers.0.moe.experts", "layers.0.experts"),
        ("layers.0.self_attn.router", "layers.0.self_attn.router"),
    ],
)
def test_names(name, site):
    assert canonical(name) == site
