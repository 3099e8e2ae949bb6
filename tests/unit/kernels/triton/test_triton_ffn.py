"""The Triton kernels for FFN mixtures, in Triton's interpreter, against the definition."""

from dataclasses import replace

import pytest
import torch
from support.triton_cases import (
    CAPACITY,
    assert_close,
    ffn_experts,
    ffn_piece,
    ffn_setup,
    ffn_weights,
    mixture,
    piece,
    random,
    run_ffn,
    run_ffn_biased,
)

from molehill.kernels import reference
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.interface import UNSERVED, ExpertScale, Run, SlotWeights
from molehill.kernels.mixture import FfnMixture
from molehill.kernels.policy import Soft, TopK, TopP

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "policy", "dtype"),
    [
        (("gate_proj", "up_proj", "down_proj"), TopK(2), torch.float32),
        (("gate_proj", "up_proj", "down_proj"), TopK(2), torch.bfloat16),
        (("gate_proj", "down_proj"), TopP(0.5), torch.float32),
        (("up_proj",), TopK(1, normalize=False), torch.float32),
        (("down_proj",), Soft(), torch.float32),
        ((), TopP(0.4), torch.float32),
    ],
    ids=str,
)
def test_ffn_mixtures_agree_with_the_definition(names, policy, dtype) -> None:
    d, width, tokens = 24, 70, 7
    weights, bias = ffn_weights(d, width, dtype), random(d, seed=23).to(dtype)
    ffn_mixture = FfnMixture(ffn_experts(names, d, width, 4), policy, random(4, d, seed=24))
    serving, handle, linears = ffn_setup(d, width, dtype)
    serving.store(2, SlotWeights({}, {handle: ffn_piece(ffn_mixture, bias.float())}))
    x = random(tokens, d, seed=25).to(dtype)
    serving.begin_step([])
    base = run_ffn(serving, handle, linears, weights, x, bias)
    serving.begin_step([Run(2, 0, 4), Run(UNSERVED, 4, 5)])
    y = run_ffn(serving, handle, linears, weights, x, bias)
    biases = {"gate_proj": None, "up_proj": None, "down_proj": bias}
    expected, routing = reference.ffn_mixture(x[:4], weights, biases, "silu", ffn_mixture)
    assert_close(y[:4], expected)
    assert torch.equal(y[5:], base[5:])
    assert y[4].count_nonzero() == 0
    site = serving.counters(2).sites["mlp"]
    assert site.expert_tokens == (routing.weights > 0).sum(0).tolist()
    assert site.decisions == 4


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "d", "width"), [(5, 600, 130), (260, 24, 70)])
def test_split_inputs_and_long_steps_of_ffn_mixtures_agree_with_the_definition(
    tokens, d, width
) -> None:
    weights = ffn_weights(d, width, torch.float32)
    names = ("gate_proj", "up_proj", "down_proj")
    ffn_mixture = FfnMixture(
        ffn_experts(names, d, width, 3), TopK(2), random(3, d, seed=24, scale=d**-0.5)
    )
    capacity = replace(CAPACITY, tokens=tokens)
    serving, handle, linears = ffn_setup(d, width, torch.float32, capacity)
    serving.store(0, SlotWeights({}, {handle: ffn_piece(ffn_mixture)}))
    x = random(tokens, d, seed=25)
    serving.begin_step([Run(0, 0, tokens)])
    y = run_ffn(serving, handle, linears, weights, x)
    biases = dict.fromkeys(weights)
    assert_close(y, reference.ffn_mixture(x, weights, biases, "silu", ffn_mixture)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_experts_that_are_dora_agree_with_the_definition(biased, dtype) -> None:
    """Factors on gate_proj alone, and on both; the factors are worked out as the engine does."""
    d, width = 24, 70
    weights = ffn_weights(d, width, dtype)
    names = ("gate_proj", "up_proj", "down_proj")
    biases = {name: random(len(w), seed=40) if biased else None for name, w in weights.items()}
    for scaled in (("gate_proj",), ("gate_proj", "up_proj")):
        magnitudes = {n: 1 + 0.5 * random(4, width, seed=30 + len(n)) for n in scaled}
        ffn_mixture = FfnMixture(ffn_experts(names, d, width, 4), TopK(2), random(4, d, seed=24))
        plain = ffn_piece(ffn_mixture, biases["down_proj"])
        tables, stacks = {}, dict(ffn_mixture.experts)
        for name in scaled:
            pair, weight = ffn_mixture.experts[name], weights[name].float()
            norms = torch.stack([(weight + b @ a).norm(dim=1) for a, b in pair.split()])
            factors = magnitudes[name] / norms
            tables[f"{name[:-5]}_scale"] = ExpertScale(factors, biases[name])
            stacks[name] = replace(pair, b=pair.b * factors[pair.expert_of_row].T)
        served = {name[:-5]: stacks[name] for name in scaled}
        serving, handle, linears = ffn_setup(d, width, dtype)
        serving.store(1, SlotWeights({}, {handle: replace(plain, **served, **tables)}))
        x = random(6, d, seed=25).to(dtype)
        serving.begin_step([Run(1, 1, 6)])
        y = run_ffn_biased(serving, handle, linears, weights, biases, x)
        mixture = replace(ffn_mixture, magnitudes=magnitudes)
        assert_close(y[1:], reference.ffn_mixture(x[1:], weights, biases, "silu", mixture)[0])


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_agrees_with_torch(activation) -> None:
    d, width = 16, 20
    weights = ffn_weights(d, width, torch.float32)
    ffn_mixture = FfnMixture(
        ffn_experts(("gate_proj",), d, width, 2), Soft(), random(2, d, seed=24), activation
    )
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    serving.store(0, SlotWeights({}, {handle: ffn_piece(ffn_mixture, activation=activation)}))
    x = random(3, d, seed=25)
    serving.begin_step([Run(0, 0, 3)])
    y = run_ffn(serving, handle, linears, weights, x, activation=activation)
    biases = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    assert_close(y, reference.ffn_mixture(x, weights, biases, activation, ffn_mixture)[0])


@pytest.mark.slow
def test_an_ffn_mixture_and_linear_mixtures_live_in_one_ffn() -> None:
    d, width = 24, 40
    weights = ffn_weights(d, width, torch.float32)
    names = ("gate_proj", "up_proj", "down_proj")
    ffn_mixture = FfnMixture(ffn_experts(names, d, width, 3), TopK(2), random(3, d, seed=24))
    up, down = mixture(TopK(1), (2, 3), d, width, 30), mixture(Soft(), (1, 2), width, d, 40)
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    serving.store(0, SlotWeights({}, {handle: ffn_piece(ffn_mixture)}))
    pieces = {linears[0]: [piece(up, width, "up")], linears[1]: [piece(down, 0, "down")]}
    serving.store(1, SlotWeights(pieces, {}))
    serving.store(
        2, SlotWeights({linears[1]: [piece(down, 0, "down")]}, {handle: ffn_piece(ffn_mixture)})
    )
    x = random(9, d, seed=25)
    serving.begin_step([Run(0, 0, 3), Run(1, 3, 6), Run(2, 6, 9)])
    y = run_ffn(serving, handle, linears, weights, x)
    biases = dict.fromkeys(weights)
    whole = reference.ffn_mixture(x, weights, biases, "silu", ffn_mixture)[0]
    assert_close(y[:3], whole[:3])
    hidden = (
        torch.nn.functional.silu(x @ weights["gate_proj"].T)
        * (reference.linear_mixture(x, weights["up_proj"], None, up)[0])
    )
    expected = reference.linear_mixture(hidden, weights["down_proj"], None, down)[0]
    assert_close(y[3:6], expected[3:6])
    # Slot 2's linear mixture on down reads h = sum_e w_e u_e, which the definition keeps inside.
    w = reference.route(x, ffn_mixture.router, ffn_mixture.policy, 3).weights
    pairs = [ffn_mixture.experts[name].split() for name in names[:2]]
    h = torch.zeros(9, width)
    for e in range(3):
        gate, up_e = (
            x @ (weights[name] + split[e][1] @ split[e][0]).T
            for name, split in zip(names, pairs, strict=False)
        )
        h += w[:, e : e + 1] * torch.nn.functional.silu(gate) * up_e
    more = reference.linear_mixture(h, torch.zeros(d, width), None, down)[0]
    assert_close(y[6:], (whole + more)[6:])
