"""Policies that read logits, with router rows and parameters of their own, on every backend."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support import triton_cases
from support.backend_cases import assert_near, experts, random, rounded
from support.cpu_cases import thread_count, usable_isas
from support.triton_cases import CAPACITY, ffn_experts, ffn_piece, ffn_weights, run_ffn

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    CapacityError,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import AdaMoLE, Arrow, FlyLoRA, Soft, Sparsegen, Threshold
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import decide, ffn_mixture, linear_mixture
from molehill.kernels.triton.backend import TritonBackend

INPUTS, OUT, ROWS = 72, 40, 23
RANKS = (4, 8, 1, 3, 9)
POLICIES = {
    "threshold": Threshold(0.2),
    "high_threshold": Threshold(0.6),
    "arrow": Arrow(2, 0.7),
    "adamole": AdaMoLE(0.2),
    "high_adamole": AdaMoLE(0.9),
    "sparsegen": Sparsegen(11),
    "flylora": FlyLoRA(2, experts=5),
    "flylora_with_all": FlyLoRA(9, experts=5),
}


class Gate(NamedTuple):
    router: torch.Tensor
    parameters: torch.Tensor | None


def gate(policy, inputs=INPUTS, count=5, seed=0) -> Gate:
    rows = random(count + policy.extra_rows, inputs, seed=seed + 2, scale=2 * inputs**-0.5)
    numbers = policy.num_parameters
    return Gate(rows, random(numbers, seed=seed + 3) if numbers else None)


def piece(policy, out=OUT, start=0, seed=0, site="q") -> LinearPiece:
    routing = gate(policy, seed=seed)
    pair = experts(INPUTS, out, RANKS, seed)
    return LinearPiece(site, start, pair, policy, routing.router, parameters=routing.parameters)


def delta(x: torch.Tensor, one_piece: LinearPiece, dtype=torch.float32) -> torch.Tensor:
    pair = rounded(one_piece.experts, dtype)
    mixture = LinearMixture(
        pair, one_piece.policy, one_piece.router, parameters=one_piece.parameters
    )
    return linear_mixture(x, torch.zeros(pair.b.shape[0], x.shape[1]), None, mixture)[0]


@pytest.fixture(
    params=["cpu", "torch", pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.slow])]
)
def make(request):
    """A backend's constructor."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        return lambda: triton_cases.backend(replace(CAPACITY, rank=128, gates=64))
    return {"cpu": CpuBackend, "torch": TorchBackend}[request.param]


def one_linear(make, pieces, dtype=torch.float32, reduce=None, inputs=INPUTS, out=OUT):
    backend = make()
    handle = backend.register_linear(LinearShape("linear", inputs, out, dtype, reduce=reduce))
    backend.store(0, SlotWeights({handle: pieces}, {}))
    return backend, handle


def test_every_policy_gives_the_definition_in_bfloat16(make):
    for policy in POLICIES.values():
        one_piece = piece(policy)
        backend, handle = one_linear(make, [one_piece], torch.bfloat16)
        x, base = random(ROWS, INPUTS, seed=7).bfloat16(), random(ROWS, OUT, seed=8).bfloat16()
        y = base.clone()
        backend.begin_step([Run(0, 0, ROWS)])
        backend.linear(y, x, handle)
        expected = base.float() + delta(x.float(), one_piece, torch.bfloat16)
        assert_near(y, expected, torch.bfloat16)


def test_outputs_counters_and_traces_of_every_policy_are_the_definitions(make):
    for policy in POLICIES.values():
        one_piece = piece(policy)
        backend, handle = one_linear(make, [one_piece])
        x, base = random(ROWS, INPUTS, seed=7), random(ROWS, OUT, seed=8)
        y = base.clone()
        backend.trace(True)
        backend.begin_step([Run(0, 0, ROWS)])
        backend.linear(y, x, handle)
        assert_near(y, base + delta(x, one_piece), torch.float32)
        (trace,) = backend.trace(False)
        p, routing = decide(x, one_piece.router, policy, one_piece.parameters)
        torch.testing.assert_close(trace.probabilities, p, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(trace.weights, routing.weights, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(trace.entropy, routing.entropy, rtol=1e-4, atol=5e-6)
        site = backend.counters(0).sites["q"]
        assert site.decisions == ROWS
        assert site.soft == 0
        assert site.expert_tokens == (routing.weights > 0).sum(0).tolist()
        assert site.entropy == pytest.approx(routing.entropy.sum().item(), rel=1e-4)


def test_policies_share_a_fused_linear(make):
    """Neighbours with other rows per router; two of one policy have parameters of their own."""
    policies = {"q": AdaMoLE(0.3), "k": Soft(), "v": AdaMoLE(0.3), "o": Sparsegen(3), "g": Arrow(1)}
    pieces = [
        piece(policy, out=8, start=8 * i, seed=10 * i, site=site)
        for i, (site, policy) in enumerate(list(policies.items())[:4])
    ]
    if isinstance(make(), TritonBackend):
        pieces = pieces[:3]
    backend, handle = one_linear(make, pieces, out=8 * len(pieces))
    x, y = random(9, INPUTS, seed=7), torch.zeros(9, 8 * len(pieces))
    backend.begin_step([Run(0, 0, 9)])
    backend.linear(y, x, handle)
    assert_near(y, torch.cat([delta(x, one_piece) for one_piece in pieces], dim=1), torch.float32)


@pytest.mark.parametrize("name", ["adamole", "sparsegen", "arrow"])
def test_logits_of_sharded_inputs_are_summed_before_they_are_routed(make, name):
    """Each of two ranks has half of the inputs, and gets the other's logits from `reduce`."""
    one_piece, half = piece(POLICIES[name]), INPUTS // 2
    x = random(ROWS, INPUTS, seed=7)
    whole = x @ one_piece.router.T
    total = torch.zeros(ROWS, OUT)

    def reduce(logits):
        summed = logits.clone()
        summed.view(-1)[: whole.numel()] = whole.flatten()
        if logits.dim() == 3:  # Triton's scratch [splits, T, gates]
            summed = torch.zeros_like(logits)
            summed[0, :, : whole.shape[1]] = whole
        return summed.view_as(logits)

    for columns in (slice(0, half), slice(half, INPUTS)):
        pair = Experts(
            one_piece.experts.a[:, columns], one_piece.experts.b, one_piece.experts.ranks
        )
        cut = replace(one_piece, experts=pair, router=one_piece.router[:, columns])
        backend, handle = one_linear(make, [cut], reduce=reduce, inputs=half)
        backend.begin_step([Run(0, 0, ROWS)])
        backend.linear(total, x[:, columns].contiguous(), handle)
    assert_near(total, delta(x, one_piece), torch.float32)


@pytest.mark.parametrize("name", ["adamole", "sparsegen", "arrow", "threshold"])
def test_ffn_mixtures_route_by_them_too(make, name):
    d, width, policy = 20, 24, POLICIES[name]
    rows = gate(policy, d, 4)
    mixture = FfnMixture(
        ffn_experts(("gate_proj", "up_proj", "down_proj"), d, width, 4),
        policy,
        rows.router,
        parameters=rows.parameters,
    )
    backend = make()
    up = backend.register_linear(LinearShape("gate_up", d, 2 * width))
    down = backend.register_linear(LinearShape("down", width, d))
    handle = backend.register_ffn(FfnShape("mlp", up, down, width))
    stored = replace(ffn_piece(mixture), parameters=mixture.parameters)
    backend.store(0, SlotWeights({}, {handle: stored}))
    weights, x = ffn_weights(d, width, torch.float32), random(6, d, seed=5)
    backend.begin_step([Run(0, 0, 6)])
    y = run_ffn(backend, handle, (up, down), weights, x)
    biases = dict.fromkeys(weights)
    expected, _ = ffn_mixture(x, weights, biases, "silu", mixture)
    assert_near(y, expected, torch.float32)


@pytest.mark.parametrize("isa", usable_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_and_thread_count(isa, threads):
    pieces = [
        piece(policy, out=10, start=10 * i, seed=i, site=name)
        for i, (name, policy) in enumerate(POLICIES.items())
    ]
    out = 10 * len(pieces)
    backend, handle = one_linear(lambda: CpuBackend(isa=isa), pieces, out=out)
    with thread_count(threads):
        for rows in (1, 3, 9, 150):
            x, y = random(rows, INPUTS, seed=rows), torch.zeros(rows, out)
            backend.begin_step([Run(0, 0, rows)])
            backend.linear(y, x, handle)
            assert_near(
                y, torch.cat([delta(x, one_piece) for one_piece in pieces], dim=1), torch.float32
            )


def flylora(rank: int, k: int) -> LinearPiece:
    """As it is read: experts of rank 1, and their A for a router."""
    pair = experts(INPUTS, OUT, (1,) * rank)
    biases = random(rank, seed=3, scale=0.1)
    return LinearPiece("q", 0, pair, FlyLoRA(k, rank), pair.a, parameters=biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flyloras_ranks_are_experts_of_every_backend(make, dtype):
    """In bfloat16 the router stays float32: the same experts are chosen."""
    rank = 16 if isinstance(make(), TritonBackend) else 64
    mixture = flylora(rank, rank // 4)
    backend, handle = one_linear(make, [mixture], dtype)
    x, y = random(ROWS, INPUTS, seed=7).to(dtype), torch.zeros(ROWS, OUT, dtype=dtype)
    backend.begin_step([Run(0, 0, ROWS)])
    backend.linear(y, x, handle)
    assert_near(y, delta(x.float(), mixture, dtype), dtype)
    assert sum(backend.counters(0).sites["q"].expert_tokens) == ROWS * (rank // 4)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(17, "found 17 experts, expected at most 16"), (49, "at most 48 experts with biases")],
)
def test_more_ranks_than_triton_has_room_for_are_refused_with_the_limit(interpreted, rank, message):
    capacity = CAPACITY if rank == 17 else replace(CAPACITY, experts=64)
    backend = triton_cases.backend(capacity)
    handle = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    with pytest.raises(CapacityError, match=message):
        backend.store(0, SlotWeights({handle: [flylora(rank, 2)]}, {}))
    assert backend.resident_bytes(0) == 0


def test_a_large_mlp_is_served_and_one_beyond_the_kernels_is_refused():
    for hidden, fits in ((1019, True), (1020, False)):
        one_piece = piece(Sparsegen(hidden))
        if not fits:
            with pytest.raises(CapacityError, match="1020 more router rows"):
                one_linear(CpuBackend, [one_piece])
            continue
        backend, handle = one_linear(CpuBackend, [one_piece])
        x, y = random(ROWS, INPUTS, seed=1), torch.zeros(ROWS, OUT)
        backend.begin_step([Run(0, 0, ROWS)])
        backend.linear(y, x, handle)
        assert_near(y, delta(x, one_piece), torch.float32)


def test_a_hidden_layer_beyond_a_gpu_s_capacity_is_refused():
    """Its rows are router rows."""
    backend = TritonBackend(triton_cases.CPU, CAPACITY)
    handle = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    with pytest.raises(CapacityError, match="router rows, expected at most 48"):
        backend.store(0, SlotWeights({handle: [piece(Sparsegen(48))]}, {}))
    assert backend.resident_bytes(0) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": None}, "parameters: found None"),
        ({"parameters": torch.zeros(2)}, "parameters"),
        ({"router": torch.zeros(5, INPUTS)}, "router"),
        ({"router": None}, "router: found none"),
    ],
    ids=["no parameters", "too many", "no extra row", "no router"],
)
def test_a_piece_that_lacks_what_its_policy_needs_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        one_linear(CpuBackend, [replace(piece(AdaMoLE(0.2)), **change)])
