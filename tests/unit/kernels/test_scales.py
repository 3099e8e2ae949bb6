"""Mixed vectors: what the property tests leave out, on every backend that has them."""

from dataclasses import replace

import pytest
import torch
from support.backend_cases import assert_near, experts, random, router
from support.cpu_cases import thread_count, usable_isas

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    CapacityError,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import ScaleMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import probabilities, scale_mixture, split_heads
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.launch_config import Capacity

HEADS, EXPERTS, WIDTH, ROWS = 3, 5, 20, 17


@pytest.fixture(params=[*usable_isas(), "torch"])
def backend(request):
    return TorchBackend() if request.param == "torch" else CpuBackend(isa=request.param)


def vectors(policy, heads=HEADS, width=WIDTH, seed=0) -> ScaleMixture:
    scales = 1 + random(heads, EXPERTS, width, seed=seed, scale=0.5)
    return ScaleMixture(scales, policy, router(EXPERTS, width, seed))


def piece(mixture: ScaleMixture, start=0, site="k") -> ScalePiece:
    return ScalePiece(site, mixture.policy, mixture.router, mixture.vectors, start)


def ffn_in(backend, width, reduce=None):
    """Handles of an FFN, and of its down linear."""
    gate_up = backend.register_linear(LinearShape("gate_up", 8, 2 * width))
    down = backend.register_linear(LinearShape("down", width, 8, reduce=reduce))
    return backend.register_ffn(FfnShape("mlp", gate_up, down, width))


def test_columns_beside_the_heads_keep_every_bit(backend):
    mixture = vectors(Soft())
    handle = backend.register_linear(LinearShape("qkv", 8, 90))
    backend.store(0, SlotWeights({}, {}, {handle: [piece(mixture, 11)]}))
    x, base = random(ROWS, 8, seed=1), random(ROWS, 90, seed=2)
    y = base.clone()
    backend.begin_step([Run(0, 2, ROWS)])
    backend.linear(y, x, handle)
    columns = slice(11, 11 + HEADS * WIDTH)
    assert_near(y[2:, columns], scale_mixture(base[2:, columns], mixture)[0], torch.float32)
    base[2:, columns] = y[2:, columns]
    assert torch.equal(y, base)


def test_vectors_come_after_the_linears_other_mixtures(backend):
    """Two projections of one linear: low-rank experts on one, vectors on the other."""
    scale_mixture = vectors(TopK(2))
    pair = LinearPiece("q", 0, experts(8, 30, [2, 3], 7), Soft(), router(2, 8, 7))
    handle = backend.register_linear(LinearShape("qk", 8, 30 + HEADS * WIDTH))
    x, base = random(ROWS, 8, seed=1), random(ROWS, 30 + HEADS * WIDTH, seed=2)
    alone = []
    for slot, weights in enumerate(
        (
            SlotWeights({handle: [pair]}, {}),
            SlotWeights({}, {}, {handle: [piece(scale_mixture, 30)]}),
        )
    ):
        backend.store(slot, weights)
        alone.append(base.clone())
        backend.begin_step([Run(slot, 0, ROWS)])
        backend.linear(alone[-1], x, handle)
    backend.store(2, SlotWeights({handle: [pair]}, {}, {handle: [piece(scale_mixture, 30)]}))
    y = base.clone()
    backend.begin_step([Run(2, 0, ROWS)])
    backend.linear(y, x, handle)
    assert torch.equal(y, torch.cat([alone[0][:, :30], alone[1][:, 30:]], dim=1))
    assert not torch.equal(y[:, :30], base[:, :30])


@pytest.mark.parametrize("policy", [Soft(), TopK(2), DynMoLE()])
def test_a_decision_is_one_token_at_one_head(backend, policy):
    mixture = vectors(policy)
    handle = backend.register_linear(LinearShape("k", 8, HEADS * WIDTH))
    backend.store(3, SlotWeights({}, {}, {handle: [piece(mixture)]}))
    base = random(ROWS, HEADS * WIDTH, seed=2)
    backend.trace(True)
    backend.begin_step([Run(3, 4, ROWS)])
    backend.linear(base.clone(), random(ROWS, 8, seed=1), handle)
    (trace,) = backend.trace(False)
    routing = scale_mixture(base[4:], mixture)[1]
    p = probabilities(split_heads(base[4:], HEADS), mixture.router)
    assert trace.probabilities.shape == (ROWS - 4, HEADS, EXPERTS)
    torch.testing.assert_close(trace.probabilities, p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.weights, routing.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trace.entropy, routing.entropy, rtol=1e-4, atol=2e-6)
    counters = backend.counters(3)
    site = counters.sites["k"]
    assert (counters.tokens, site.decisions) == (ROWS - 4, HEADS * (ROWS - 4))
    assert site.expert_tokens == (routing.weights > 0).sum((0, 1)).tolist()
    assert site.soft == int(routing.soft.sum())
    assert site.entropy == pytest.approx(routing.entropy.sum().item(), rel=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_an_intermediate_are_routed_as_the_whole(backend, threads):
    """Two ranks with half of an FFN's intermediate each; the other's logits come from `reduce`."""
    width, rows = 36, 300
    mixture = vectors(TopK(2), heads=1, width=width)
    h = random(rows, width, seed=3)
    seen = []

    def reduce(logits):
        seen.append(logits.clone())
        return (h[5:] @ mixture.router.T).view_as(logits)

    result = h.clone()
    for columns in (slice(0, 18), slice(18, 36)):
        handle = ffn_in(backend, 18, reduce)
        part = replace(piece(mixture), router=mixture.router[:, columns].contiguous())
        part = replace(part, vectors=mixture.vectors[:, :, columns].contiguous())
        backend.store(columns.start, SlotWeights({}, {}, {}, {handle: part}))
        backend.begin_step([Run(columns.start, 5, rows)])
        with thread_count(threads):
            backend.ffn(result[:, columns], torch.zeros(rows, 36), handle)
    whole = (h[5:] @ mixture.router.T).flatten()
    torch.testing.assert_close(seen[0].flatten() + seen[1].flatten(), whole)
    assert_near(result[5:], scale_mixture(h[5:], mixture)[0], torch.float32)
    assert torch.equal(result[:5], h[:5])


def test_the_trace_of_an_intermediate_has_no_heads(backend):
    handle = ffn_in(backend, WIDTH)
    backend.store(0, SlotWeights({}, {}, {}, {handle: piece(vectors(Soft(), heads=1), site="d")}))
    backend.trace(True)
    backend.begin_step([Run(0, 0, ROWS)])
    backend.ffn(random(ROWS, WIDTH), torch.zeros(ROWS, 2 * WIDTH), handle)
    (trace,) = backend.trace(False)
    assert (trace.site, trace.probabilities.shape) == ("d", (ROWS, EXPERTS))
    assert trace.entropy.shape == (ROWS,)


def test_an_erased_slot_leaves_no_bytes_and_its_rows_are_void(backend):
    handle = backend.register_linear(LinearShape("k", 8, HEADS * WIDTH))
    mlp = ffn_in(backend, WIDTH)
    backend.store(
        0,
        SlotWeights({}, {}, {handle: [piece(vectors(Soft()))]}, {mlp: piece(vectors(Soft(), 1))}),
    )
    assert backend.resident_bytes(0) >= 4 * (HEADS + 1 + 2) * EXPERTS * WIDTH
    backend.begin_step([Run(0, 0, 2)])
    backend.erase(0)
    assert backend.resident_bytes(0) == 0
    y = random(3, HEADS * WIDTH)
    backend.linear(y, random(3, 8), handle)
    assert not y[:2].any()
    assert y[2].any()


def test_bytes_to_be_reserved_count_vectors_and_factors():
    scale_mixture = piece(vectors(Soft()))
    weights = SlotWeights({}, {}, {0: [scale_mixture]}, {0: scale_mixture})
    assert weights.num_bytes(torch.bfloat16) == 2 * 4 * (HEADS + 1) * EXPERTS * WIDTH


def test_vectors_that_do_not_fit_are_refused_by_the_cpu_backend():
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("k", 8, HEADS * WIDTH))
    mlp = ffn_in(backend, WIDTH)
    good = piece(vectors(Soft()))
    refused = {
        "columns 1 to 61": SlotWeights({}, {}, {handle: [replace(good, start=1)]}),
        r"router: found \(5, 19\)": SlotWeights(
            {}, {}, {handle: [replace(good, router=router(EXPERTS, 19))]}
        ),
        "constant weights: found 1": SlotWeights(
            {}, {}, {handle: [replace(good, policy=Constant((1.0,)))]}
        ),
        r"vectors: found \(3, 20\), expected \(1, 20\)": SlotWeights({}, {}, {}, {mlp: good}),
    }
    for message, weights in refused.items():
        with pytest.raises(ValueError, match=message):
            backend.store(0, weights)
    backend.store(0, SlotWeights({}, {}, {handle: [good]}))


def test_the_gpu_backend_refuses_vectors_before_anything_is_stored():
    capacity = Capacity(adapters=1, tokens=16, memory=1 << 16)
    backend = TritonBackend(torch.device("cpu"), capacity)
    handle = backend.register_linear(LinearShape("k", 8, HEADS * WIDTH))
    with pytest.raises(CapacityError, match="k: found vectors of MoV"):
        backend.store(0, SlotWeights({}, {}, {handle: [piece(vectors(Soft()))]}))
    assert backend.resident_bytes(0) == 0
