"""(IA)^3 vectors under CUDA graphs, where they are output scales, against the definition."""

import pytest
import torch
from support.triton_cases import assert_close, backend, mixture, piece, random

from molehill.kernels.interface import (
    BaseActivation,
    CapacityError,
    FfnShape,
    LinearShape,
    Run,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import ScaleMixture
from molehill.kernels.policy import Constant, Soft
from molehill.kernels.reference import linear_mixture, scale_mixture

pytestmark = pytest.mark.usefixtures("interpreted")

D, WIDTH = 6, 24


def vectors(experts: int, width: int, seed: int, heads: int = 1) -> ScaleMixture:
    scales = 1 + random(heads, experts, width, seed=seed, scale=0.5)
    return ScaleMixture(scales, Soft(), random(experts, width, seed=seed + 1))


def scale_piece(scales: ScaleMixture, start: int, site: str) -> ScalePiece:
    return ScalePiece(site, scales.policy, scales.router, scales.vectors, start)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_vector_multiplies_an_output_beside_mixtures_of_other_columns(dtype) -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("qkv", D, 40, dtype))
    low_rank, scales = mixture(Soft(), (2, 1), D, 16, seed=5), vectors(1, 11, 1)
    weights = SlotWeights(
        {handle: [piece(low_rank, 0, "q")]}, {}, {handle: [scale_piece(scales, 20, "v")]}
    )
    serving.store(1, weights)
    x, base = random(5, D, seed=2).to(dtype), random(5, 40, seed=3).to(dtype)
    y = base.clone()
    serving.begin_step([Run(1, 1, 4)])
    serving.linear(y, x, handle)
    expected = base.float()
    expected[1:4, :16] += linear_mixture(x[1:4], torch.zeros(16, D), None, low_rank)[0]
    expected[1:4, 20:31] = scale_mixture(base[1:4, 20:31], scales)[0]
    assert_close(y, expected)
    serving.erase(1)
    assert serving.table.arena.free_bytes == serving.table.arena.budget


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, BaseActivation("silu", is_rounded=False)], ids=str)
def test_one_vector_multiplies_an_ffns_intermediate(activation) -> None:
    serving = backend()
    up = serving.register_linear(LinearShape("gate_up", D, 2 * WIDTH))
    down = serving.register_linear(LinearShape("down", WIDTH, D))
    mlp = serving.register_ffn(FfnShape("mlp", up, down, WIDTH, activation))
    scales = vectors(1, WIDTH, 1)
    serving.store(0, SlotWeights({}, {}, {}, {mlp: scale_piece(scales, 0, "mlp")}))
    x, gate_up = random(4, D, seed=2), random(4, 2 * WIDTH, seed=3)
    h = torch.nn.functional.silu(gate_up[:, :WIDTH]) * gate_up[:, WIDTH:]
    serving.begin_step([Run(0, 1, 3)])
    expected = h.clone()
    expected[1:3] = scale_mixture(h[1:3], scales)[0]
    serving.linear(gate_up, x, up)
    if activation is None:
        h = torch.nn.functional.silu(gate_up[:, :WIDTH]) * gate_up[:, WIDTH:]
        serving.ffn(h, gate_up, mlp)
    else:
        serving.activate(h, gate_up, mlp)
    assert_close(h, expected)


@pytest.mark.parametrize("experts", [1, 3])
def test_vectors_that_wait_for_something_else_are_refused(experts) -> None:
    """Several, whose router reads the output; one on what a low-rank pair changes."""
    serving = backend()
    handle = serving.register_linear(LinearShape("k", D, WIDTH))
    static = piece(mixture(Constant((1.0,)), (2,), D, WIDTH, seed=5), 0, "k")
    pieces = {handle: [static]} if experts == 1 else {}
    scales = scale_piece(vectors(experts, WIDTH, 1), 0, "k")
    with pytest.raises(CapacityError, match=r"k: found .* expected .* eager mode"):
        serving.store(0, SlotWeights(pieces, {}, {handle: [scales]}))
    assert serving.resident_bytes(0) == 0
