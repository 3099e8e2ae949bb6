"""Adapters against the tiny Llama: 4 layers, hidden 64, q_proj 64 -> 128, FFN 176."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.errors import (
    BaseMismatchError,
    LimitError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check, problems, validate
from molehill.engine.hf.shapes import base_model
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, ScaleMixture
from molehill.kernels.policy import AdaMoLE, Constant, FlyLoRA, Soft, Sparsegen, TopK

CASES = ["lora", "dora", "mixlora-expert-lora", "mixlora-switch", "mola", "loramoe", "dynmole-k1"]
PLAIN = Constant((1.0,))


@pytest.fixture(scope="module")
def tiny(golden):
    return base_model(golden / "tiny-llama")


def experts(ranks, inputs, outputs):
    return Experts(torch.ones(sum(ranks), inputs), torch.ones(outputs, sum(ranks)), tuple(ranks))


def lora(inputs=64, outputs=128):
    return LinearMixture(experts([2], inputs, outputs), PLAIN)


def ffn(activation="silu", **stacks):
    stacks = stacks or {"up_proj": experts([2, 2], 64, 176), "down_proj": experts([2, 2], 176, 64)}
    return FfnMixture(stacks, TopK(2), torch.ones(2, 64), activation)


def adapter(**sites):
    """The sites given, beside two sound ones."""
    sound = {"layers.2.self_attn.q_proj": lora(), "layers.3.self_attn.q_proj": lora()}
    return Adapter("test", {**sound, **sites}, base_model="some-base")


def refusal(kind, adapter, base, limits=formats.DEFAULT_LIMITS):
    with pytest.raises(kind) as caught:
        validate(adapter, base, limits)
    assert type(caught.value) is kind
    return caught.value


def test_the_base_model_is_the_loaded_models_linears(golden, tiny):
    model = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama")
    modules = dict(model.model.named_modules())
    assert tiny.architecture == "LlamaForCausalLM"
    assert len(tiny.linears) == 28
    for name, (inputs, outputs) in tiny.linears.items():
        assert tuple(modules[name].weight.shape) == (outputs, inputs)
    assert tiny.ffns == {f"layers.{i}.mlp": "silu" for i in range(4)}


def test_a_base_model_comes_from_a_config_alone(golden, tiny):
    config = AutoConfig.from_pretrained(golden / "tiny-llama")
    assert base_model(config).linears == tiny.linears


@pytest.mark.parametrize(
    ("policy", "rows", "numbers", "where", "message"),
    [
        (AdaMoLE(0.2), 3, None, "parameters", "no tensor"),
        (AdaMoLE(0.2), 3, 2, "parameters", "[2]"),
        (AdaMoLE(0.2), 2, 1, "router", "[2, 64]"),
        (AdaMoLE(0.2), None, 1, "router", "no tensor"),
        (Sparsegen(4), 6, 4, "parameters", "[4]"),
        (FlyLoRA(1, experts=3), 2, 3, "routing", "FlyLoRA for 3 experts"),
        (Soft(), 2, 1, "parameters", "[1]"),
        (Soft(), None, None, "router", "no tensor"),
        (TopK(1), None, None, "router", "no tensor"),
    ],
)
def test_a_policy_needs_its_rows_and_parameters(tiny, policy, rows, numbers, where, message):
    mixture = LinearMixture(
        experts([2, 2], 64, 128),
        policy,
        None if rows is None else torch.ones(rows, 64),
        parameters=None if numbers is None else torch.ones(numbers),
    )
    site = "layers.0.self_attn.q_proj"
    error = refusal(ShapeError, adapter(**{site: mixture}), tiny)
    assert (error.where, error.found) == (f"{site}.{where}", message)


def test_constant_weights_have_no_router(tiny):
    mixture = dataclasses.replace(lora(), router=torch.ones(1, 64))
    site = "layers.0.self_attn.q_proj"
    error = refusal(UnsupportedError, adapter(**{site: mixture}), tiny)
    assert (error.where, error.found) == (f"{site}.router", "a router beside constant weights")
    mixture = dataclasses.replace(ffn(), policy=Constant((0.5, 0.5)))
    error = refusal(UnsupportedError, adapter(**{"layers.0.mlp": mixture}), tiny)
    assert error.where == "layers.0.mlp.router"
    vectors = ScaleMixture(torch.ones(4, 2, 32), Constant((0.5, 0.5)), torch.ones(2, 32))
    error = refusal(UnsupportedError, adapter(**{site: vectors}), tiny)
    assert error.where == f"{site}.routing"


@pytest.mark.parametrize(("rows", "numbers"), [(5, 7), (5, None), (4, 7)])
def test_an_ffn_mixture_may_have_extra_rows_and_parameters(tiny, rows, numbers):
    parameters = None if numbers is None else torch.ones(numbers)
    mixture = dataclasses.replace(
        ffn(), policy=Sparsegen(3), router=torch.ones(rows, 64), parameters=parameters
    )
    result = problems(adapter(**{"layers.0.mlp": mixture}), tiny, Limits())
    assert bool(result) == ((rows, numbers) != (5, 7))


@pytest.mark.parametrize("case", CASES)
def test_the_golden_adapters_fit(golden, tiny, case):
    assert problems(formats.read(golden / "cases" / case), tiny, Limits()) == []


def test_sound_sites_are_sound(tiny):
    assert problems(adapter(**{"layers.0.mlp": ffn()}), tiny, Limits()) == []


def test_an_unknown_linear_is_named_with_examples(tiny):
    error = refusal(UnknownTargetError, adapter(**{"layers.1.self_attn.qq_proj": lora()}), tiny)
    assert error.where == "layers.1.self_attn.qq_proj"
    assert "layers.1.self_attn.q_proj" in error.expected


def test_a_layer_of_a_digit_that_is_no_number_is_unknown(tiny):
    site = "layers.\N{SUPERSCRIPT TWO}.self_attn.q_proj"
    assert refusal(UnknownTargetError, adapter(**{site: lora()}), tiny).where == site


def test_an_invocation_that_no_prompt_can_hold(tiny):
    activated = dataclasses.replace(adapter(), invocation_tokens=(3, 511))
    validate(activated, tiny, Limits())
    unreadable = dataclasses.replace(activated, invocation_tokens=(3, 512))
    error = refusal(UnsupportedError, unreadable, tiny)
    assert (error.where, error.found) == ("alora_invocation_tokens", "token 512")


def test_a_module_that_no_layer_has_is_unknown_not_a_mismatch(tiny):
    sites = {f"layers.{i}.mlp.w1": lora() for i in range(4)}
    assert refusal(UnknownTargetError, Adapter("lora", sites), tiny).where == "layers.0.mlp.w1"


def test_an_unknown_ffn(tiny):
    error = refusal(UnknownTargetError, adapter(**{"layers.1.moe": ffn()}), tiny)
    assert (error.where, error.found) == ("layers.1.moe", "no such gated FFN in the base model")
    assert "layers.1.mlp" in error.expected


@pytest.mark.parametrize(
    ("mixture", "where", "message", "expected"),
    [
        (lora(inputs=65), "a", "[2, 65]", "[2, 64]"),
        (lora(outputs=64), "b", "[64, 2]", "[128, 2]"),
        (
            LinearMixture(experts([2, 1], 64, 128), Soft(), torch.ones(2, 32)),
            "router",
            "[2, 32]",
            "[2, 64]",
        ),
        (
            LinearMixture(experts([2], 64, 128), PLAIN, magnitude=torch.ones(64)),
            "magnitude",
            "[64]",
            "[128]",
        ),
    ],
)
def test_wrong_shapes_of_a_linear(tiny, mixture, where, message, expected):
    site = "layers.0.self_attn.q_proj"
    error = refusal(ShapeError, adapter(**{site: mixture}), tiny)
    assert (error.where, error.found, error.expected) == (f"{site}.{where}", message, expected)


@pytest.mark.parametrize(
    ("mixture", "where", "expected"),
    [
        (ffn(up_proj=experts([2, 2], 64, 175)), "up_proj.b", "[176, 4]"),
        (ffn(down_proj=experts([2, 2], 175, 64)), "down_proj.a", "[4, 176]"),
        (ffn(gate_proj=experts([2, 2], 63, 176)), "gate_proj.a", "the router's 64"),
        (ffn(down_proj=experts([2, 2], 176, 63)), "down_proj.b", "the router's 64"),
        (ffn(up_proj=experts([2, 2, 2], 64, 176)), "up_proj", "the router's 2"),
        (
            ffn(gate_proj=experts([2, 2], 64, 176), up_proj=experts([2, 2], 64, 170)),
            "up_proj.b",
            "the FFN's inner width 176",
        ),
    ],
)
def test_wrong_shapes_of_an_ffn(tiny, mixture, where, expected):
    error = refusal(ShapeError, adapter(**{"layers.0.mlp": mixture}), tiny)
    assert (error.where, error.expected) == (f"layers.0.mlp.{where}", expected)


def test_a_router_of_another_width(tiny):
    mixture = FfnMixture({}, TopK(1, normalize=False), torch.ones(2, 32), "silu")
    error = refusal(ShapeError, adapter(**{"layers.0.mlp": mixture}), tiny)
    assert (error.where, error.expected) == ("layers.0.mlp.router", "[2, 64]")


def test_ranks_that_do_not_add_up(tiny):
    broken = LinearMixture(Experts(torch.ones(4, 64), torch.ones(128, 4), (2, 1)), Soft())
    error = refusal(ShapeError, adapter(**{"layers.0.self_attn.q_proj": broken}), tiny)
    assert (error.found, error.expected) == ("[4, 64]", "[3, 64]")


def test_a_base_of_another_width(golden, tiny):
    result = formats.read(golden / "cases" / "lora")
    config = AutoConfig.from_pretrained(golden / "tiny-llama")
    config.hidden_size, config.intermediate_size = 96, 200
    error = refusal(BaseMismatchError, result, base_model(config))
    assert error.where == "adapter for tiny-llama"
    assert error.found.startswith("28 of 28 sites")
    assert "LlamaForCausalLM, 4 layers" in error.expected


def test_a_base_with_fewer_layers(golden):
    config = AutoConfig.from_pretrained(golden / "tiny-llama")
    config.num_hidden_layers = 1
    error = refusal(BaseMismatchError, formats.read(golden / "cases" / "lora"), base_model(config))
    assert error.found.startswith("21 of 28 sites")
    assert "1 layers" in error.expected


def test_problems_lists_what_validate_would_raise_and_the_rest(golden):
    config = AutoConfig.from_pretrained(golden / "tiny-llama")
    config.num_hidden_layers = 3
    result = problems(formats.read(golden / "cases" / "mola"), base_model(config), Limits(rank=1))
    kinds = [type(problem) for problem in result]
    assert kinds == [LimitError] * 12 + [UnknownTargetError] * 3


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(experts=1), "experts 2"),
        (Limits(rank=1), "rank 2"),
        (Limits(total_rank=7), "rank rows 8"),
    ],
)
def test_limits_of_a_site(tiny, limits, message):
    sites = {"layers.0.mlp": ffn()}
    error = refusal(LimitError, Adapter("mixlora", sites), tiny, limits)
    assert (error.where, error.found) == ("layers.0.mlp", message)


def test_the_limit_on_bytes(tiny):
    result = adapter()
    error = refusal(LimitError, result, tiny, Limits(adapter_bytes=result.num_bytes - 1))
    assert error.found == f"{2 * 4 * (2 * 64 + 128 * 2)} bytes"
    validate(result, tiny, Limits(adapter_bytes=result.num_bytes))


def test_an_unknown_activation(tiny):
    error = refusal(UnsupportedError, adapter(**{"layers.0.mlp": ffn("quick_gelu")}), tiny)
    assert (error.where, error.found) == ("layers.0.mlp.activation", "quick_gelu")
    assert "silu" in error.expected


def test_the_bases_unknown_activation_matters_only_where_it_is_used(tiny):
    odd = dataclasses.replace(tiny, ffns=dict.fromkeys(tiny.ffns, "xielu"))
    validate(adapter(**{"layers.0.mlp": ffn("silu")}), odd, Limits())
    error = refusal(UnsupportedError, adapter(**{"layers.0.mlp": ffn(None)}), odd)
    assert error.found == "xielu"


def test_a_linear_inside_an_ffn_mixture(tiny):
    sites = {"layers.0.mlp": ffn(), "layers.0.mlp.up_proj": lora(64, 176)}
    assert refusal(UnsupportedError, adapter(**sites), tiny).where == "layers.0.mlp.up_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tiny, value):
    broken = lora()
    broken.experts.b[3, 1] = value
    error = refusal(NonFiniteError, adapter(**{"layers.0.self_attn.q_proj": broken}), tiny)
    assert error.where == "layers.0.self_attn.q_proj.b"


def test_no_sites_bind_nothing(tiny):
    assert refusal(NothingBoundError, Adapter("lora", {}), tiny).found == "0 sites, no effect"


def test_a_rank_row_acts_only_if_both_halves_do():
    one = Experts(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]]), (2,))
    with pytest.raises(NothingBoundError):
        check(Adapter("lora", {"layers.0.x": LinearMixture(one, PLAIN)}), Limits())
    one.b[0, 0] = 1.0
    check(Adapter("lora", {"layers.0.x": LinearMixture(one, PLAIN)}), Limits())


def test_a_magnitude_alone_acts(tiny):
    zeros = Experts(torch.zeros(2, 64), torch.zeros(128, 2), (2,))
    site = LinearMixture(zeros, PLAIN, magnitude=torch.ones(128))
    check(Adapter("dora", {"layers.0.self_attn.q_proj": site}), Limits())


def test_a_base_without_layers_has_nothing_to_bind():
    empty = BaseModel("empty", "None", {}, {})
    assert refusal(BaseMismatchError, adapter(), empty).expected.endswith("(None, 0 layers)")
