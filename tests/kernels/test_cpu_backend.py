"""The C++ backend against the definition, on shapes that fit no vector width."""

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.backend import (
    UNSERVED,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.cpu import BuildError, CpuBackend
from molehill.kernels.cpu.backend import ISAS
from molehill.kernels.definition import ffn_mixture, linear_mixture, probabilities
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP

# Relative to the largest output. bfloat16 has 8 bits: half a unit is 0.002 of one rounding, and
# the delta goes through two (the shrunk input, the output).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

POLICIES = {
    "soft": Soft(),
    "top_1_raw": TopK(1, normalize=False),
    "top_2": TopK(2),
    "top_p": TopP(0.6),
    "top_p_cold": TopP(0.9, temperature=0.7),
    "constant": Constant((0.5, 0.25, 0.125, 1.0, 0.0)),
    "dynmole": DynMoLE(),
    "dynmole_sparse": DynMoLE(entropy_threshold=1.0, keep_top_k=1, top_p=0.5),
    "dynmole_shannon": DynMoLE(entropy_index=1.0, entropy_threshold=0.8),
    "dynmole_renyi": DynMoLE(entropy_type="renyi", entropy_index=1.5, entropy_threshold=0.7),
    "dynmole_paper": DynMoLE(
        normalize_weights=True,
        include_crossing=True,
        normalize_entropy=False,
        entropy_threshold=0.95,
    ),
}


def usable_isas():
    found = []
    for isa in ISAS:
        try:
            found.append(CpuBackend(isa=isa).isa)
        except ValueError:
            continue
    return found


USABLE = usable_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in USABLE:
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@contextmanager
def thread_count(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request):
    with thread_count(request.param):
        yield request.param


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def experts(inputs: int, out: int, ranks: Sequence[int], seed: int = 0) -> Experts:
    rank = sum(ranks)
    return Experts(
        random(rank, inputs, seed=seed, scale=inputs**-0.5),
        random(out, rank, seed=seed + 1),
        tuple(ranks),
    )


def router(count: int, inputs: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return random(count, inputs, seed=seed + 2, scale=scale * inputs**-0.5)


def rounded(pair: Experts, dtype: torch.dtype) -> Experts:
    """What the backend computes with: A and B in the activations' dtype."""
    return Experts(pair.a.to(dtype).float(), pair.b.to(dtype).float(), pair.ranks)


def piece_delta(x: torch.Tensor, piece: LinearPiece, dtype: torch.dtype) -> torch.Tensor:
    """The definition's y of a piece over a base weight of zeros."""
    pair = rounded(piece.experts, dtype)
    weight = torch.zeros(pair.b.shape[0], x.shape[1])
    mixture = LinearMixture(pair, piece.policy, piece.router)
    return linear_mixture(x, weight, None, mixture)[0]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    assert (found.float() - expected).abs().max().item() <= TOLERANCE[dtype] * max(scale, 1e-3)


def one_linear(inputs: int, out: int, pieces: Sequence[LinearPiece], dtype, isa=None):
    backend = CpuBackend(isa=isa)
    handle = backend.register_linear(LinearShape("linear", inputs, out, dtype))
    backend.store(0, SlotWeights({handle: pieces}, {}))
    return backend, handle


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_and_dtype_gives_the_definition(policy, dtype):
    inputs, out, rows = 72, 40, 23
    pair = experts(inputs, out, [4, 8, 1, 3, 9])
    piece = LinearPiece("q", 0, pair, policy, router(5, inputs))
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


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("rows", [1, 13, 700])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
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


WIDTHS = {"gate": (36, 76), "up": (36, 76), "down": (76, 36)}


def run_ffn(piece, activation, rows, dtype, isa=None, biased=True, widths=WIDTHS):
    """The backend's ops around base GEMMs, as a model calls them; and the definition's y."""
    d, intermediate = widths["gate"]
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    weights = {
        name: random(widths[short][1], widths[short][0], seed=i, scale=0.15).to(dtype).float()
        for i, (name, short) in enumerate(names.items())
    }
    biases = {
        name: random(weight.shape[0], seed=20 + i) if biased else None
        for i, (name, weight) in enumerate(weights.items())
    }
    piece = dataclasses.replace(piece, bias=biases["down_proj"])
    backend = CpuBackend(isa=isa)
    gate_up = backend.register_linear(LinearShape("gate_up", d, 2 * intermediate, dtype))
    down = backend.register_linear(LinearShape("down", intermediate, d, dtype))
    ffn = backend.register_ffn(FfnShape("mlp", gate_up, down, intermediate))
    backend.store(0, SlotWeights({}, {ffn: piece}))
    x = random(rows + 2, d, seed=30).to(dtype)
    act = ACTIVATIONS[activation]

    def base(name, value):
        bias = biases[name]
        return (value.float() @ weights[name].T + (0 if bias is None else bias)).to(dtype)

    pre = torch.cat([base("gate_proj", x), base("up_proj", x)], dim=1)
    backend.begin_step([Run(0, 1, rows + 1)])
    backend.linear(pre, x, gate_up)
    h = (act(pre[:, :intermediate].float()) * pre[:, intermediate:].float()).to(dtype)
    plain = h.clone()
    backend.ffn(h, pre, ffn)
    y = base("down_proj", h)
    before = y.clone()
    backend.linear(y, h, down)
    for edge in (0, rows + 1):
        assert torch.equal(h[edge], plain[edge])
        assert torch.equal(y[edge], before[edge])
    mixture = FfnMixture(
        {
            name: rounded(pair, dtype)
            for name, short in names.items()
            if (pair := getattr(piece, short)) is not None
        },
        piece.policy,
        piece.router,
        activation,
    )
    expected = ffn_mixture(x.float(), weights, biases, "relu", mixture)[0]
    return y[1:-1], expected[1:-1], backend


def ffn_piece(present, policy, activation="silu", widths=WIDTHS, ranks=(4, 8, 3)):
    pairs = {
        name: experts(*widths[name], ranks, seed=i)
        for i, name in enumerate(widths)
        if name in present
    }
    pairs = {name: pairs.get(name) for name in widths}
    return FfnPiece("mlp", policy, router(len(ranks), widths["gate"][0]), activation, **pairs)


SUBSETS = [c for n in range(4) for c in itertools.combinations(WIDTHS, n)]


@pytest.mark.parametrize("present", SUBSETS, ids="_".join)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_inside_an_ffn_give_the_definition(present, dtype):
    for policy in (TopK(2), TopP(0.5)):
        y, expected, _ = run_ffn(ffn_piece(present, policy), "silu", 9, dtype)
        assert_near(y, expected, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gives_the_definition(activation):
    piece = ffn_piece(WIDTHS, TopK(2), activation)
    y, expected, _ = run_ffn(piece, activation, 40, torch.float32)
    assert_near(y, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 301])
def test_ffn_on_every_instruction_set_and_thread_count(isa, threads, dtype, rows):
    piece = ffn_piece(WIDTHS, DynMoLE())
    y, expected, backend = run_ffn(piece, "silu", rows, dtype, isa, biased=False)
    assert_near(y, expected, dtype)
    assert backend.counters(0).sites["mlp"].decisions == rows


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_of_a_large_ffn_are_shared_out_by_weights(isa, rows):
    widths = {"gate": (70, 700), "up": (70, 700), "down": (700, 70)}
    piece = ffn_piece(widths, TopK(3), widths=widths, ranks=[32] * 8)
    for threads in (1, 3):
        with thread_count(threads):
            y, expected, _ = run_ffn(piece, "silu", rows, torch.float32, isa, widths=widths)
            assert_near(y, expected, torch.float32)


def test_an_erased_slot_can_be_stored_again_and_leaves_no_bytes():
    inputs, out = 64, 64
    first = LinearPiece("q", 0, experts(inputs, out, [8] * 2), Soft(), router(2, inputs))
    second = LinearPiece("q", 0, experts(inputs, out, [8], 9), Constant((1.0,)))
    backend, handle = one_linear(inputs, out, [first], torch.float32)
    # A and B of 16 ranks, and a router padded to 8 experts.
    assert backend.resident_bytes(0) == 4 * (16 * 64 + 64 * 16 + 8 * 64)
    backend.begin_step([Run(0, 0, 2)])
    backend.erase(0)
    y, x = torch.ones(2, out), random(2, inputs)
    backend.linear(y, x, handle)
    assert y.count_nonzero() == 0
    assert backend.resident_bytes(0) == 0
    backend.store(0, SlotWeights({handle: [second]}, {}))
    assert backend.counters(0).tokens == 0
    backend.begin_step([Run(0, 0, 2)])
    backend.linear(y, x, handle)
    assert_near(y, piece_delta(x, second, torch.float32), torch.float32)


def test_a_piece_that_does_not_fit_is_refused_and_the_slot_stays_empty():
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("linear", 16, 16))
    good = LinearPiece("q", 0, experts(16, 16, [2, 2]), Soft(), router(2, 16))
    broken = {
        "columns 8 to 24": dataclasses.replace(good, start=8),
        r"a: found \(4, 15\)": dataclasses.replace(good, experts=experts(15, 16, [2, 2])),
        r"router: found \(3, 16\)": dataclasses.replace(good, router=router(3, 16)),
        "constant weights: found 1, expected 2": dataclasses.replace(
            good, policy=Constant((1.0,)), router=None
        ),
        r"output_scale: found \(2, 15\)": dataclasses.replace(good, output_scale=random(2, 15)),
    }
    for message, piece in broken.items():
        with pytest.raises(ValueError, match=message):
            backend.store(0, SlotWeights({handle: [piece]}, {}))
    backend.store(0, SlotWeights({handle: [good]}, {}))
    with pytest.raises(ValueError, match="expected an empty slot"):
        backend.store(0, SlotWeights({handle: [good]}, {}))


def test_wrong_activations_are_an_error_and_no_crash():
    piece = LinearPiece("q", 0, experts(16, 16, [2]), Constant((1.0,)))
    backend, handle = one_linear(16, 16, [piece], torch.float32)
    backend.begin_step([Run(0, 0, 2)])
    with pytest.raises(RuntimeError, match=r"x: found Float \[2, 8\]"):
        backend.linear(torch.zeros(2, 16), torch.zeros(2, 8), handle)
    with pytest.raises(RuntimeError, match="out: found BFloat16"):
        backend.linear(torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 16), handle)
    with pytest.raises(RuntimeError, match="no layer with handle"):
        backend.linear_op(torch.zeros(2, 16), torch.zeros(2, 16), torch.tensor([1 << 40]))


def test_rows_that_are_not_contiguous_are_read_and_written_in_place():
    piece = LinearPiece("q", 0, experts(16, 24, [4]), Constant((1.0,)))
    backend, handle = one_linear(16, 24, [piece], torch.float32)
    x, wide = random(16, 6).T, torch.zeros(6, 40)
    backend.begin_step([Run(0, 0, 6)])
    backend.linear(wide[:, 8:32], x, handle)
    transposed = torch.zeros(24, 6).T
    backend.linear(transposed, x, handle)
    expected = piece_delta(x, piece, torch.float32)
    assert_near(wide[:, 8:32], expected, torch.float32)
    assert_near(transposed, expected, torch.float32)
    assert wide[:, :8].count_nonzero() == wide[:, 32:].count_nonzero() == 0


def test_the_ops_trace_under_torch_compile():
    piece = LinearPiece("q", 0, experts(16, 24, [4]), Constant((1.0,)))
    backend, handle = one_linear(16, 24, [piece], torch.float32)
    name, op = torch.tensor([handle]), backend.linear_op

    def model(x, weight):
        out = x @ weight.T
        op(out, x, name)
        return out * 2

    x, weight = random(3, 16), random(24, 16, seed=2)
    backend.begin_step([Run(0, 0, 3)])
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x, weight)
    expected = 2 * (x @ weight.T + piece_delta(x, piece, torch.float32))
    assert_near(y, expected, torch.float32)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="MOLEHILL_CPU_ISA: found 'sse9'"):
        CpuBackend(isa="sse9")


def test_without_a_compiler_and_a_library_the_reason_is_told(tmp_path):
    code = "from molehill.kernels.cpu.build import load; load()"
    environment = {**os.environ, "MOLEHILL_CACHE_DIR": str(tmp_path), "PATH": "", "CXX": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode != 0
    assert b"BuildError: no C++ compiler" in done.stderr
    assert issubclass(BuildError, RuntimeError)
