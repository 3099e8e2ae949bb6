"""The reference on Transformers against oracles that other code made: the golden cases and PEFT."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from support.golden import ROUNDED, SERVED, Case, served_path
from support.logits import logits_of
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.errors import UnknownTargetError
from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.reference import attach

UNROUTED = ("lora", "rslora", "dora")
LOGITS = 1e-3
ROUTING = 1e-5


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32).eval()


def greedy(model, tokens, steps):
    tokens = list(tokens)
    for _ in range(steps):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[-steps:]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["base", *SERVED, "xlora"])
def test_logits_and_greedy_tokens_are_the_oracles(golden, model, case):
    directory = golden / "cases" / case
    prompts = json.loads((directory / "oracle.json").read_text())["prompts"]
    oracle = load_file(directory / "oracle.safetensors")
    attached = nullcontext() if case == "base" else attach(model, formats.read(served_path(case)))
    with attached:
        for i, prompt in enumerate(prompts):
            logits = logits_of(model, prompt["prompt_token_ids"])
            expected = oracle[f"prompt{i}.logits"] if i == 0 else oracle[f"prompt{i}.logits_last"]
            result = logits if i == 0 else logits[-1]
            torch.testing.assert_close(result, expected, rtol=0, atol=LOGITS)
            tokens = prompt["greedy_token_ids"]
            assert greedy(model, prompt["prompt_token_ids"], len(tokens)) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SERVED if case not in UNROUTED])
def test_routing_is_the_oracles(golden, model, case):
    directory = golden / "cases" / case
    prompt = json.loads((directory / "oracle.json").read_text())["prompts"][0]
    trace = {}
    with attach(model, formats.read(served_path(case)), trace):
        logits_of(model, prompt["prompt_token_ids"])
    routes = Case(case).routes()
    assert routes
    for site, route in routes.items():
        (entry,) = trace[site]
        result = {"p": entry.probabilities, "w": entry.weights, "entropy": entry.entropy}
        for figure, expected in route.items():
            close = ROUNDED.get(case, ROUTING)
            torch.testing.assert_close(result[figure], expected, rtol=0, atol=close)


def test_an_activated_lora_acts_from_its_invocation_on_as_in_peft(golden, model):
    directory = golden / "cases" / "alora"
    prompts = json.loads((directory / "oracle.json").read_text())["prompts"]
    oracle = load_file(directory / "oracle.safetensors")
    adapter = formats.read(directory)
    for i, prompt in enumerate(prompts):
        tokens, start = prompt["prompt_token_ids"], prompt["invocation_start"]
        start = len(tokens) if start is None else start
        with attach(model, adapter, start=start):
            result = logits_of(model, tokens)
        torch.testing.assert_close(result, oracle[f"logits.{i}"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("case", ["mixlora", "mov", "dynmole-k1"])
def test_before_its_first_position_a_mixture_is_the_base(golden, model, case):
    tokens = [303, 316, 288, 262, 352, 17]
    adapter = formats.read(golden / "cases" / case)
    with attach(model, adapter, start=4):
        result = logits_of(model, tokens)
    torch.testing.assert_close(result[:4], logits_of(model, tokens)[:4], rtol=0, atol=0)
    with attach(model, adapter):
        whole = logits_of(model, tokens)
    assert (result[4:] - whole[4:]).abs().max() > 0.01
    assert (result[4:] - logits_of(model, tokens)[4:]).abs().max() > 0.01


def test_detaching_restores_the_model(golden, model):
    tokens = [303, 316, 288, 262, 352]
    before = logits_of(model, tokens)
    with attach(model, formats.read(golden / "cases" / "mixlora")):
        assert not torch.equal(logits_of(model, tokens), before)
    assert torch.equal(logits_of(model, tokens), before)


def test_a_site_that_the_model_lacks_is_refused_before_anything_changes(golden, model):
    adapter = formats.read(golden / "cases" / "lora")
    sites = {**adapter.sites, "layers.9.mlp.up_proj": adapter.sites["layers.0.mlp.up_proj"]}
    before = {name: module.forward for name, module in model.named_modules()}
    with pytest.raises(UnknownTargetError, match=r"layers\.9\.mlp\.up_proj"):
        attach(model, Adapter("lora", sites)).__enter__()
    assert {name: module.forward for name, module in model.named_modules()} == before


PEFT_CONFIGS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "o_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5, r"layers\.[12]\.self_attn\.q_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 9, "^layers.1": 100, "down_proj": 7},
    },
    "all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "some-layers": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1, 3],
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_saved_by_peft_gives_pefts_logits(golden, model, tmp_path, name):
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    fresh_model = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(
        fresh_model, peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[name])
    )
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2)
            if "lora_magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    wrapped.eval().save_pretrained(tmp_path)
    tokens = [303, 316, 288, 262, 352, 17, 5]
    expected = logits_of(wrapped, tokens)
    assert (expected - logits_of(model, tokens)).abs().max() > 0.1
    with attach(model, formats.read(tmp_path)):
        torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=LOGITS)
