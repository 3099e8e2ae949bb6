"""The gate weights of rows that somebody asks for, on every backend, against the definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import triton_cases
from support.backend_cases import random
from support.triton_cases import ffn_experts, ffn_piece, ffn_weights, mixture, piece, run_ffn

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import FfnShape, LinearShape, Run, ScalePiece, SlotWeights
from molehill.kernels.mixture import FfnMixture, ScaleMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import decide, scale_mixture
from molehill.kernels.routed_site import RoutedSite

IN, OUT, D, WIDTH = 24, 40, 24, 40
CAPACITY = replace(triton_cases.CAPACITY, captures=True, vectors=True)


@pytest.fixture(
    params=["cpu", "torch", pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.slow])]
)
def serving(request):
    """A backend with a linear and an FFN, and their handles."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        backend = triton_cases.backend(CAPACITY)
    else:
        backend = {"cpu": CpuBackend, "torch": TorchBackend}[request.param]()
    linear = backend.register_linear(LinearShape("qkv", IN, OUT))
    up = backend.register_linear(LinearShape("gate_up", D, 2 * WIDTH))
    down = backend.register_linear(LinearShape("down", WIDTH, D))
    return backend, linear, backend.register_ffn(FfnShape("mlp", up, down, WIDTH)), (up, down)


Q, K = mixture(TopK(2), (2, 3, 1), IN, 16, seed=1), mixture(DynMoLE(), (2, 2, 4, 1), IN, 8, seed=5)
STATIC = mixture(Constant((1.0,)), (2,), IN, 8, seed=9)
VECTORS = ScaleMixture(random(2, 3, 4, seed=3), Soft(), random(3, 4, seed=4))
FFN = FfnMixture(
    ffn_experts(("gate_proj", "up_proj", "down_proj"), D, WIDTH, 4), TopK(1), random(4, D, seed=6)
)


def weights(linear: int, ffn: int) -> SlotWeights:
    pieces = [piece(STATIC, 0, "s"), piece(Q, 8, "q"), piece(K, 24, "k")]
    scale = ScalePiece("v", VECTORS.policy, VECTORS.router, VECTORS.vectors, 32)
    return SlotWeights({linear: pieces}, {ffn: ffn_piece(FFN)}, {linear: [scale]})


def test_captured_rows_are_the_weights_that_the_definition_gives(serving) -> None:
    """Of rows of two slots in one step, some of them, in another order than theirs."""
    backend, linear, ffn, linears = serving
    backend.store(1, SlotWeights({linear: [piece(K, 24, "k")]}, {}))
    backend.store(0, weights(linear, ffn))
    assert [(s.name, s.experts, s.heads, s.most, s.column) for s in backend.routed_sites(0)] == [
        ("q", 3, 1, 2, 0),
        ("k", 4, 1, 4, 3),
        ("mlp", 4, 1, 1, 7),
        ("v", 3, 2, 3, 11),
    ]
    x, base = random(9, IN, seed=2), random(9, OUT, seed=3)
    y = base.clone()
    backend.begin_step([Run(0, 0, 4), Run(1, 5, 7), Run(0, 7, 9)])
    rows = [8, 1, 5]
    backend.capture(rows)
    backend.linear(y, x, linear)
    run_ffn(backend, ffn, linears, ffn_weights(D, WIDTH, torch.float32), x)
    result = backend.captured()
    expected = torch.zeros(3, 17)
    zeros = base[:, 32:40]
    for place, row in enumerate(rows):
        sites = {site.name: site for site in backend.routed_sites(1 if row == 5 else 0)}
        routed: dict[str, Any] = {"q": Q, "k": K, "mlp": FFN}
        for name, served in routed.items():
            if name in sites:
                site = sites[name]
                columns = slice(site.column, site.stop)
                expected[place, columns] = decide(x[row : row + 1], served.router, served.policy)[
                    1
                ][0]
        if "v" in sites:
            columns = slice(sites["v"].column, sites["v"].stop)
            routing = scale_mixture(zeros[row : row + 1], VECTORS)[1]
            expected[place, columns] = routing.weights.flatten()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-6)


def test_a_step_keeps_nothing_that_was_asked_of_the_one_before(serving) -> None:
    backend, linear, _, _ = serving
    backend.store(0, SlotWeights({linear: [piece(Q, 0, "q")]}, {}))
    x, y = random(3, IN, seed=2), torch.zeros(3, OUT)
    backend.begin_step([Run(0, 0, 3)])
    backend.capture([2])
    backend.linear(y, x, linear)
    first = backend.captured().clone()
    assert (first > 0).sum() == 2
    backend.begin_step([Run(0, 0, 3)])
    backend.linear(y, -x, linear)
    kept = backend.captured()
    assert kept.numel() == 0 or torch.equal(kept, first)


def test_what_comes_back_into_a_slot_has_its_sites(serving) -> None:
    backend, linear, ffn, _ = serving
    backend.store(0, weights(linear, ffn))
    sites = backend.routed_sites(0)
    packed = backend.erase(0)
    assert backend.routed_sites(0) == ()
    if packed is None:
        return
    backend.store(2, packed)
    assert backend.routed_sites(2) == sites
    assert all(isinstance(site, RoutedSite) for site in sites)
