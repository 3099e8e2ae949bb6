"""Pairs that every row gets: beside a router's experts, and under an FFN mixture, every backend."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from support import triton_cases
from support.triton_cases import CAPACITY
from torch.nn import functional as F

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import ffn_mixture, linear_mixture

# Relative to the largest output: float32 in other orders.
EXACT = 2e-5


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def experts(inputs, out, ranks, seed=0):
    rank = sum(ranks)
    a = random(rank, inputs, seed=seed, scale=inputs**-0.5)
    return Experts(a, random(out, rank, seed=seed + 1, scale=rank**-0.5), tuple(ranks))


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


class Setup(NamedTuple):
    """A backend and sizes for it: for three C++ threads large enough that they share the columns
    of a few rows."""

    make: Callable[[], Any]
    inputs: int = 40
    out: int = 90
    rank: int = 2
    steps: int = 1


@pytest.fixture(
    params=["cpu", "cpu, 3 threads", "torch", pytest.param("triton", marks=pytest.mark.gpu)]
)
def setup(request):
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        yield Setup(triton_cases.backend)
    elif request.param == "cpu, 3 threads":
        with threads(3):
            yield Setup(CpuBackend, 515, 770, 96, 10)
    else:
        yield Setup(TorchBackend if request.param == "torch" else CpuBackend)


def assert_near(actual, expected):
    assert (actual - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Soft(), TopK(2), DynMoLE()], ids=repr)
def test_a_shared_pair_beside_routed_experts(setup, policy):
    """Of two projections of one linear; the second has no shared pair."""
    make, inputs, out, rank, steps = setup
    rows = 5
    mixture = LinearMixture(
        experts(inputs, out, [2 * rank, rank, rank + 1]),
        policy,
        random(3, inputs, seed=5, scale=inputs**-0.5),
        shared=experts(inputs, out, [rank + 5], seed=8),
    )
    other = LinearMixture(experts(inputs, 30, [2, 2], 20), Soft(), random(2, inputs, seed=25))
    backend = make()
    handle = backend.register_linear(LinearShape("linear", inputs, out + 30))
    pieces = [
        LinearPiece("q", 0, mixture.experts, policy, mixture.router, shared=mixture.shared),
        LinearPiece("k", out, other.experts, other.policy, other.router),
    ]
    backend.store(1, SlotWeights({handle: pieces}, {}))
    x, weight = random(rows, inputs, seed=6), random(out + 30, inputs, seed=7, scale=inputs**-0.5)
    expected = torch.cat(
        [
            linear_mixture(x, weight[:out], None, mixture)[0],
            linear_mixture(x, weight[out:], None, other)[0],
        ],
        dim=1,
    )
    # Two threads on the same columns would lose sums only now and then.
    for _ in range(steps):
        y = x @ weight.T
        backend.begin_step([Run(1, 0, rows)])
        backend.linear(y, x, handle)
        assert_near(y, expected)
    stats = backend.counters(1)
    chosen = policy.route(torch.softmax(x @ mixture.router.T, -1)).weights > 0
    assert stats.sites["q"].expert_tokens == (steps * chosen.sum(0)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [2, 9])
def test_an_ffn_mixture_on_merged_weights(setup, rows, biased):
    """The base has W + B A; pieces that take B A back stand beside the mixture's experts."""
    make, d, inner, rank, steps = setup
    shapes = {"gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d)}
    weights = {
        n: random(o, i, seed=s, scale=i**-0.5) for s, (n, (i, o)) in enumerate(shapes.items())
    }
    merged = {
        n: experts(*shape, [rank + 1], seed=30 + s) for s, (n, shape) in enumerate(shapes.items())
    }
    slot_weights = {
        n: experts(*shape, [rank, 1, rank], seed=60 + s)
        for s, (n, shape) in enumerate(shapes.items())
    }
    mixture = FfnMixture(slot_weights, TopK(2), random(3, d, seed=9), "silu")
    bias = random(d, seed=10) if biased else None
    backend = make()
    gate_up = backend.register_linear(LinearShape("gate_up", d, 2 * inner))
    down = backend.register_linear(LinearShape("down", inner, d))
    ffn = backend.register_ffn(FfnShape("mlp", gate_up, down, inner))
    backend.seal()

    def undo(name, start=0):
        pair = Experts(merged[name].a, -merged[name].b, merged[name].ranks)
        return LinearPiece(name, start, pair, Constant((1.0,)))

    linears = {gate_up: [undo("gate_proj"), undo("up_proj", inner)], down: [undo("down_proj")]}
    piece = FfnPiece("mlp", TopK(2), mixture.router, "silu", *slot_weights.values(), bias=bias)
    backend.store(0, SlotWeights(linears, {ffn: piece}))
    backend.store(2, SlotWeights(linears, {}))
    served = {n: weights[n] + merged[n].b @ merged[n].a for n in shapes}
    x = random(2 * rows, d, seed=11)
    biases = {"gate_proj": None, "up_proj": None, "down_proj": bias}
    mixed = ffn_mixture(x[:rows], weights, biases, "silu", mixture)[0]
    plain = F.silu(x[rows:] @ weights["gate_proj"].T) * (x[rows:] @ weights["up_proj"].T)
    plain = plain @ weights["down_proj"].T + (0 if bias is None else bias)
    for _ in range(steps):
        pre = torch.cat([x @ served["gate_proj"].T, x @ served["up_proj"].T], dim=1)
        backend.begin_step([Run(0, 0, rows), Run(2, rows, 2 * rows)])
        backend.linear(pre, x, gate_up)
        h = F.silu(pre[:, :inner]) * pre[:, inner:]
        backend.ffn(h, pre, ffn)
        y = h @ served["down_proj"].T + (0 if bias is None else bias)
        backend.linear(y, h, down)
        assert_near(y[:rows], mixed)
        assert_near(y[rows:], plain)


@pytest.mark.slow
def test_a_shared_pair_is_no_expert_of_a_gpu_s_capacity(interpreted):
    backend = triton_cases.backend()
    handle = backend.register_linear(LinearShape("linear", 8, 8))
    router, pairs = random(CAPACITY.experts, 8), experts(8, 8, [1] * CAPACITY.experts)
    shared = experts(8, 8, [1], seed=4)
    full = LinearPiece("q", 0, pairs, Soft(), router, shared=shared)
    backend.store(0, SlotWeights({handle: [full]}, {}))
    x, y = random(3, 8, seed=7), torch.zeros(3, 8)
    backend.begin_step([Run(0, 0, 3)])
    backend.linear(y, x, handle)
    whole = LinearMixture(pairs, Soft(), router, shared=shared)
    assert_near(y, linear_mixture(x, torch.zeros(8, 8), None, whole)[0])


def test_a_shared_pair_that_does_not_fit_is_refused():
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("linear", 8, 8))
    piece = LinearPiece("q", 0, experts(8, 8, [2]), Soft(), random(1, 8), shared=experts(9, 8, [1]))
    with pytest.raises(ValueError, match=r"q: a: found \(1, 9\)"):
        backend.store(0, SlotWeights({handle: [piece]}, {}))
