"""The torch backend against the definition."""

import pytest
import torch
from support.backend_cases import POLICIES, assert_near, experts, piece_delta, random, router

from molehill.kernels.interface import (
    UNSERVED,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import FfnMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import ffn_mixture, probabilities

INPUTS, OUT, ROWS = 72, 40, 23
RANKS = [4, 8, 1, 3, 9]


def piece(policy, out=OUT, start=0, seed=0, site="q", **tables) -> LinearPiece:
    gate = None if isinstance(policy, Constant) else router(len(RANKS), INPUTS, seed)
    return LinearPiece(site, start, experts(INPUTS, out, RANKS, seed), policy, gate, **tables)


def serving(pieces_by_slot, dtype=torch.float32, out=OUT, reduce=None):
    backend = TorchBackend()
    handle = backend.register_linear(LinearShape("linear", INPUTS, out, dtype, reduce=reduce))
    for slot, pieces in pieces_by_slot.items():
        backend.store(slot, SlotWeights({handle: pieces}, {}))
    return backend, handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_gives_the_definition(policy, dtype):
    one_piece = piece(policy)
    backend, handle = serving({0: [one_piece]}, dtype)
    x, base = random(ROWS, INPUTS, seed=7).to(dtype), random(ROWS, OUT, seed=8).to(dtype)
    y = base.clone()
    backend.begin_step([Run(0, 0, ROWS)])
    backend.linear(y, x, handle)
    assert_near(y, base.float() + piece_delta(x.float(), one_piece, dtype), dtype)


def test_slots_mix_in_one_batch_and_base_rows_keep_every_bit():
    """Three projections of one linear in slot 0, one in slot 1; runs of a slot lie apart."""
    fused = [
        piece(Soft(), 10, 0, seed=1, site="q"),
        piece(Constant((1.0,) * 5), 10, 10, seed=2, site="k"),
        piece(DynMoLE(), 20, 20, seed=3, site="v"),
    ]
    single = [piece(TopK(2), 20, 20, seed=4)]
    backend, handle = serving({0: fused, 1: single})
    x, base = random(ROWS, INPUTS, seed=7), random(ROWS, OUT, seed=8)
    y = base.clone()
    runs = [Run(0, 0, 4), Run(1, 5, 9), Run(0, 9, 12), Run(UNSERVED, 12, 14), Run(1, 20, 21)]
    backend.begin_step(runs)
    backend.linear(y, x, handle)
    expected = base.clone()
    for run in runs:
        rows = slice(run.start, run.stop)
        if run.slot == UNSERVED:
            expected[rows] = 0
            continue
        for one_piece in (fused, single)[run.slot]:
            columns = slice(one_piece.start, one_piece.start + one_piece.experts.b.shape[0])
            expected[rows, columns] += piece_delta(x[rows], one_piece, torch.float32)
    assert_near(y, expected, torch.float32)
    untouched = [4, *range(14, 20), 21, 22]
    assert torch.equal(y[untouched], base[untouched])
    assert not y[12:14].any()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_counters_are_the_policys_own_figures(policy):
    one_piece = piece(policy)
    backend, handle = serving({3: [one_piece]})
    x = random(ROWS, INPUTS, seed=7)
    for start, stop in ((0, 5), (5, ROWS)):
        backend.begin_step([Run(3, 0, stop - start)])
        backend.linear(torch.zeros(stop - start, OUT), x[start:stop], handle)
    counters = backend.counters(3)
    assert counters.tokens == ROWS
    if one_piece.router is None:
        assert not counters.sites
        return
    routing = policy.route(probabilities(x, one_piece.router))
    result = counters.sites["q"]
    assert result.decisions == ROWS
    assert result.expert_tokens == (routing.weights > 0).sum(0).tolist()
    assert result.soft == int(routing.soft.sum())
    assert result.entropy == pytest.approx(routing.entropy.sum().item(), rel=1e-5)


@pytest.mark.parametrize("routed", [False, True])
def test_output_scale_multiplies_the_base_without_its_bias(routed):
    scale, bias = 1 + 0.5 * random(len(RANKS), OUT, seed=11), random(OUT, seed=12)
    policy = Soft() if routed else Constant((0.2,) * 5)
    one_piece = piece(policy, output_scale=scale, bias=bias)
    backend, handle = serving({0: [one_piece]})
    x, base = random(ROWS, INPUTS, seed=7), random(ROWS, OUT, seed=8)
    y = base.clone()
    backend.begin_step([Run(0, 0, ROWS)])
    backend.linear(y, x, handle)
    weights = torch.full((ROWS, 5), 0.2)
    if one_piece.router is not None:
        weights = probabilities(x, one_piece.router)
    expected = (base - bias) * (weights @ scale) + bias + piece_delta(x, one_piece, torch.float32)
    assert_near(y, expected, torch.float32)


def test_logits_of_sharded_inputs_are_summed_before_they_are_routed():
    """Two ranks with half of the inputs each; the other's logits come from `reduce`."""
    one_piece = piece(TopP(0.6))
    x, half = random(ROWS, INPUTS, seed=7), INPUTS // 2
    logits = x @ one_piece.router.T
    shard = LinearPiece(
        "q",
        0,
        type(one_piece.experts)(
            one_piece.experts.a[:, :half], one_piece.experts.b, one_piece.experts.ranks
        ),
        one_piece.policy,
        one_piece.router[:, :half],
    )
    backend = TorchBackend()
    shape = LinearShape("linear", half, OUT, reduce=lambda part: logits.flatten())
    handle = backend.register_linear(shape)
    backend.store(0, SlotWeights({handle: [shard]}, {}))
    y = torch.zeros(ROWS, OUT)
    backend.begin_step([Run(0, 0, ROWS)])
    backend.linear(y, x[:, :half], handle)
    weights = one_piece.policy.route(torch.softmax(logits, -1)).weights
    gates = weights[:, one_piece.experts.expert_of_row]
    expected = (x[:, :half] @ one_piece.experts.a[:, :half].T * gates) @ one_piece.experts.b.T
    assert_near(y, expected, torch.float32)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("down_proj",), ()])
@pytest.mark.parametrize("policy", [TopK(2), TopP(0.5), TopK(1, normalize=False)])
def test_experts_inside_an_ffn_give_the_definition(policy, names, monkeypatch):
    # Several chunks of rows.
    monkeypatch.setattr("molehill.kernels.pytorch.tables.FFN_CHUNK", 5 * 3 * 30)
    d, width, ranks = 24, 30, (2, 1, 3)
    shapes = {"gate_proj": (d, width), "up_proj": (d, width), "down_proj": (width, d)}
    site_experts = {n: experts(*shapes[n], ranks, seed=i) for i, n in enumerate(names)}
    mixture = FfnMixture(site_experts, policy, router(3, d, seed=9))
    weights = {n: random(o, i, seed=20 + i, scale=i**-0.5) for n, (i, o) in shapes.items()}
    bias = random(d, seed=30)
    backend = TorchBackend()
    gate_up = backend.register_linear(LinearShape("gate_up", d, 2 * width))
    down = backend.register_linear(LinearShape("down", width, d))
    handle = backend.register_ffn(FfnShape("mlp", gate_up, down, width))
    pairs = (site_experts.get(name) for name in shapes)
    ffn = FfnPiece("mlp", policy, mixture.router, "silu", *pairs, bias=bias)
    backend.store(0, SlotWeights({}, {handle: ffn}))
    x = random(ROWS, d, seed=7)
    backend.begin_step([Run(0, 0, ROWS)])
    pre = torch.cat([x @ weights["gate_proj"].T, x @ weights["up_proj"].T], dim=1)
    backend.linear(pre, x, gate_up)
    h = torch.zeros(ROWS, width)
    backend.ffn(h, pre, handle)
    y = h @ weights["down_proj"].T + bias
    backend.linear(y, h, down)
    biases = {"gate_proj": None, "up_proj": None, "down_proj": bias}
    assert_near(y, ffn_mixture(x, weights, biases, "silu", mixture)[0], torch.float32)
