"""The C++ backend's linears against the definition, on shapes that fit no vector width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_cases import (
    POLICIES,
    TOLERANCE,
    assert_near,
    experts,
    piece_delta,
    random,
    router,
)
from support.cpu_cases import one_linear, thread_count

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import UNSERVED, LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.reference import probabilities

# Constant weights have no router, which decides nothing that could be counted.
ROUTED = {name: policy for name, policy in POLICIES.items() if not isinstance(policy, Constant)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_and_dtype_gives_the_definition(policy, dtype):
    inputs, out, rows = 72, 40, 23
    pair = experts(inputs, out, [4, 8, 1, 3, 9])
    gate = None if isinstance(policy, Constant) else router(5, inputs)
    piece = LinearPiece("q", 0, pair, policy, gate)
    backend, handle = one_linear(inputs, out, [piece], dtype)
    x, base = random(rows, inputs, seed=7).to(dtype), random(rows, out, seed=8).to(dtype)
    y = base.clone()
    backend.begin_step([Run(0, 0, rows)])
    backend.linear(y, x, handle)
    assert_near(y, base.float() + piece_delta(x.float(), piece, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_and_thread_count_gives_the_definition(isa, threads, dtype):
    for rows in (1, 2, 3, 5, 7, 8, 33, 64, 150, 300):
        inputs, out = 75, 101
        pieces = [
            LinearPiece("q", 0, experts(inputs, 70, [8] * 8), DynMoLE(), router(8, inputs)),
            LinearPiece("k", 70, experts(inputs, 17, [2, 5], 9), TopK(1), router(2, inputs, 5)),
            LinearPiece("v", 87, experts(inputs, 14, [3], 11), Constant((0.7,))),
        ]
        backend, handle = one_linear(inputs, out, pieces, dtype, isa)
        x, base = random(rows, inputs, seed=rows).to(dtype), random(rows, out, seed=1).to(dtype)
        y = base.clone()
        backend.begin_step([Run(0, 0, rows)])
        backend.linear(y, x, handle)
        delta = torch.cat([piece_delta(x.float(), piece, dtype) for piece in pieces], dim=1)
        assert_near(y, base.float() + delta, dtype)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_few_rows_of_a_large_linear_are_shared_out_by_weights(isa, rows):
    """Fewer rows than threads could take: the threads work stage by stage."""
    inputs, out = 515, 770
    pieces = [
        LinearPiece("q", 0, experts(inputs, 700, [8] * 40), TopK(7), router(40, inputs)),
        LinearPiece("k", 700, experts(inputs, 70, [32, 64], 9), Soft(), router(2, inputs, 5)),
    ]
    backend, handle = one_linear(inputs, out, pieces, torch.float32, isa)
    # Many steps with other inputs each: what a thread reads too early is another step's.
    steps = random(20, rows, inputs, seed=rows)
    y = torch.zeros(20, rows, out)
    backend.begin_step([Run(0, 0, rows)])
    with thread_count(3):
        for x, out_rows in zip(steps, y, strict=True):
            backend.linear(out_rows, x, handle)
    x = steps.flatten(0, 1)
    delta = torch.cat([piece_delta(x, piece, torch.float32) for piece in pieces], dim=1)
    assert_near(y.flatten(0, 1), delta, torch.float32)
    chosen = TopK(7).route(probabilities(x, pieces[0].router)).weights > 0
    assert backend.counters(0).sites["q"].expert_tokens == chosen.sum(0).tolist()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 130),
    out=st.integers(1, 140),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_definition(rows, inputs, out, ranks, dtype, seed):
    piece = LinearPiece(
        "q", 0, experts(inputs, out, ranks, seed), Soft(), router(len(ranks), inputs, seed)
    )
    backend, handle = one_linear(inputs, out, [piece], dtype)
    x, y = random(rows, inputs, seed=seed).to(dtype), torch.zeros(rows, out, dtype=dtype)
    backend.begin_step([Run(0, 0, rows)])
    backend.linear(y, x, handle)
    assert_near(y, piece_delta(x.float(), piece, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_mix_in_one_batch_and_other_rows_keep_every_bit(threads, dtype):
    inputs, out = 64, 96
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("linear", inputs, out, dtype))
    pieces = {
        0: LinearPiece("q", 0, experts(inputs, out, [8] * 4), TopK(2), router(4, inputs)),
        3: LinearPiece("q", 0, experts(inputs, out, [16], 3), Constant((1.0,))),
        5: LinearPiece("q", 16, experts(inputs, 80, [4] * 9, 6), Soft(), router(9, inputs, 6)),
    }
    for slot, piece in pieces.items():
        backend.store(slot, SlotWeights({handle: [piece]}, {}))
    runs = [Run(0, 1, 5), Run(5, 6, 80), Run(0, 80, 81), Run(UNSERVED, 83, 85), Run(3, 85, 90)]
    x, base = random(93, inputs, seed=1).to(dtype), random(93, out, seed=2).to(dtype)
    y, expected, untouched = base.clone(), base.float(), torch.ones(93, dtype=torch.bool)
    backend.begin_step(runs)
    backend.linear(y, x, handle)
    for run in runs:
        rows = slice(run.start, run.stop)
        untouched[rows] = False
        if run.slot == UNSERVED:
            assert y[rows].count_nonzero() == 0
            expected[rows] = 0
        else:
            piece = pieces[run.slot]
            expected[rows, piece.start :] += piece_delta(x[rows].float(), piece, dtype)
    assert_near(y, expected, dtype)
    assert untouched.sum() == 7
    assert torch.equal(y[untouched], base[untouched])
    assert [backend.counters(s).tokens for s in pieces] == [5, 5, 74]


def test_rows_of_a_slot_that_holds_nothing_are_zero():
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("linear", 8, 8))
    y = torch.ones(3, 8)
    backend.begin_step([Run(4, 1, 2)])
    backend.linear(y, torch.ones(3, 8), handle)
    assert torch.equal(y[:, 0], torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 13, 700])
@pytest.mark.parametrize("policy", ROUTED.values(), ids=ROUTED)
def test_counters_and_traces_are_the_policys_own_figures(policy, threads, rows):
    inputs = 48
    g = router(5, inputs, scale=2.5)
    pieces = [
        LinearPiece("q", 0, experts(inputs, 16, [2] * 5), policy, g),
        LinearPiece("v", 16, experts(inputs, 16, [2] * 5), Constant((1.0,) * 5)),
    ]
    backend, handle = one_linear(inputs, 32, pieces, torch.float32)
    x = random(rows, inputs, seed=rows)
    assert backend.trace(True) == []
    for _ in range(2):
        backend.begin_step([Run(0, 0, rows)])
        backend.linear(torch.zeros(rows, 32), x, handle)
    first, second = backend.trace(False)
    routing = policy.route(probabilities(x, g))
    torch.testing.assert_close(first.weights, routing.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.entropy, routing.entropy, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(first.probabilities, probabilities(x, g), rtol=1e-5, atol=1e-6)
    assert torch.equal(first.weights, second.weights)
    counters = backend.counters(0)
    assert list(counters.sites) == ["q"]
    site = counters.sites["q"]
    assert (counters.tokens, site.decisions) == (2 * rows, 2 * rows)
    assert site.soft == 2 * int(routing.soft.sum())
    assert site.expert_tokens == [2 * n for n in (routing.weights != 0).sum(0).tolist()]
    assert site.entropy == pytest.approx(2 * routing.entropy.double().sum().item(), rel=1e-4)


def test_equal_probabilities_go_to_the_lower_expert():
    g = torch.zeros(6, 16)
    piece = LinearPiece("q", 0, experts(16, 8, [1] * 6), TopK(3), g)
    backend, handle = one_linear(16, 8, [piece], torch.float32)
    backend.begin_step([Run(0, 0, 4)])
    backend.linear(torch.zeros(4, 8), random(4, 16), handle)
    assert backend.counters(0).sites["q"].expert_tokens == [4, 4, 4, 0, 0, 0]


@pytest.mark.parametrize(("threshold", "soft"), [(1.0, 0), (0.99, 4)])
def test_a_threshold_of_one_disables_soft_routing_even_of_an_entropy_above_one(threshold, soft):
    policy = DynMoLE(entropy_threshold=threshold, entropy_type="renyi", entropy_index=0.5)
    assert policy.entropy(torch.full((6,), 1 / 6)) > 1
    piece = LinearPiece("q", 0, experts(16, 8, [1] * 6), policy, torch.zeros(6, 16))
    backend, handle = one_linear(16, 8, [piece], torch.float32)
    backend.begin_step([Run(0, 0, 4)])
    backend.linear(torch.zeros(4, 8), random(4, 16), handle)
    assert backend.counters(0).sites["q"].soft == soft


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_scale_multiplies_the_base_without_its_bias(routed, dtype):
    inputs, out, rows = 32, 70, 5
    pair, bias = experts(inputs, out, [4, 4]), random(out, seed=3)
    scale = 1 + 0.3 * random(2, out, seed=4)
    g = router(2, inputs) if routed else None
    policy = Soft() if routed else Constant((0.25, 0.75))
    piece = LinearPiece("q", 0, pair, policy, g, output_scale=scale, bias=bias)
    backend, handle = one_linear(inputs, out, [piece], dtype)
    x, base = random(rows, inputs, seed=5).to(dtype), random(rows, out, seed=6).to(dtype)
    y = base.clone()
    backend.begin_step([Run(0, 0, rows)])
    backend.linear(y, x, handle)
    weights = torch.tensor([[0.25, 0.75]])
    if g is not None:
        weights = policy.route(probabilities(x.float(), g)).weights
    expected = (base.float() - bias) * (weights @ scale) + bias
    assert_near(y, expected + piece_delta(x.float(), piece, dtype), dtype)


def test_logits_of_sharded_inputs_are_summed_before_they_are_routed(threads):
    inputs, out, rows, ranks = 40, 24, 67, 2
    pair, g = experts(inputs, out, [4] * 3), router(3, inputs)
    x, half = random(rows, inputs, seed=1), inputs // 2
    whole = x @ g.T
    seen = []

    def reduce(logits):
        seen.append(logits.clone())
        return whole[2:]

    total = torch.zeros(rows, out)
    for rank in range(ranks):
        columns = slice(rank * half, (rank + 1) * half)
        shard = Experts(pair.a[:, columns], pair.b, pair.ranks)
        backend = CpuBackend()
        shape = LinearShape("o_proj", half, out, reduce=reduce)
        handle = backend.register_linear(shape)
        piece = LinearPiece("o", 0, shard, TopK(2), g[:, columns])
        backend.store(1, SlotWeights({handle: [piece]}, {}))
        backend.begin_step([Run(1, 2, rows)])
        backend.linear(total, x[:, columns], handle)
    torch.testing.assert_close(seen[0] + seen[1], whole[2:])
    expected = piece_delta(x, LinearPiece("o", 0, pair, TopK(2), g), torch.float32)
    assert_near(total[2:], expected[2:], torch.float32)
    assert total[:2].count_nonzero() == 0
