"""Mixtures of vectors beside the Triton kernels, against the definition."""

from dataclasses import replace

import pytest
import torch
from support.triton_cases import CAPACITY, assert_close, backend, mixture, random
from support.triton_cases import piece as linear_piece

from molehill.kernels.interface import FfnShape, LinearShape, Run, ScalePiece, SlotWeights
from molehill.kernels.mixture import ScaleMixture
from molehill.kernels.policy import Constant, Soft, TopK
from molehill.kernels.reference import linear_mixture, scale_mixture

pytestmark = pytest.mark.usefixtures("interpreted")

HEADS, EXPERTS, WIDTH = 3, 5, 8
EAGER = replace(CAPACITY, vectors=True)


def vectors(policy, heads: int, seed: int) -> ScaleMixture:
    scales = 1 + random(heads, EXPERTS, WIDTH, seed=seed, scale=0.5)
    return ScaleMixture(scales, policy, random(EXPERTS, WIDTH, seed=seed + 1))


def piece(mixture: ScaleMixture, start: int, site: str) -> ScalePiece:
    return ScalePiece(site, mixture.policy, mixture.router, mixture.vectors, start)


@pytest.mark.slow
def test_vectors_multiply_what_the_linear_mixtures_left() -> None:
    heads, low_rank = vectors(TopK(2), HEADS, 1), mixture(Constant((1.0,)), (2,), 6, 30, seed=5)
    serving = backend(EAGER)
    handle = serving.register_linear(LinearShape("qkv", 6, 30))
    weights = SlotWeights({handle: [linear_piece(low_rank)]}, {}, {handle: [piece(heads, 4, "k")]})
    serving.store(1, weights)
    serving.store(0, SlotWeights({handle: [linear_piece(low_rank)]}, {}))
    x, base = random(7, 6, seed=2), random(7, 30, seed=3)
    y = base.clone()
    serving.trace(True)
    serving.begin_step([Run(0, 0, 2), Run(1, 3, 5), Run(1, 6, 7)])
    serving.linear(y, x, handle)
    expected = base.clone()
    served = [0, 1, 3, 4, 6]
    expected[served] += linear_mixture(x[served], torch.zeros(30, 6), None, low_rank)[0]
    columns, rows = slice(4, 4 + HEADS * WIDTH), [3, 4, 6]
    scaled, routing = scale_mixture(expected[rows][:, columns], heads)
    expected[rows, columns] = scaled
    assert_close(y, expected)
    site = serving.counters(1).sites["k"]
    assert site.decisions == 3 * HEADS
    assert site.expert_tokens == (routing.weights > 0).flatten(0, -2).sum(0).tolist()
    assert [trace.weights.shape for trace in serving.trace(False)] == [
        (2, HEADS, EXPERTS),
        (1, HEADS, EXPERTS),
    ]


def test_vectors_multiply_an_ffns_intermediate_until_they_are_unloaded() -> None:
    mixture = vectors(Soft(), 1, 1)
    serving = backend(EAGER)
    up = serving.register_linear(LinearShape("gate_up", 6, 2 * WIDTH))
    down = serving.register_linear(LinearShape("down", WIDTH, 6))
    mlp = serving.register_ffn(FfnShape("mlp", up, down, WIDTH))
    weights = SlotWeights({}, {}, {}, {mlp: piece(mixture, 0, "mlp")})
    serving.store(0, weights)
    assert serving.resident_bytes(0) >= 4 * 2 * EXPERTS * WIDTH
    base = random(4, WIDTH, seed=3)
    h = base.clone()
    serving.begin_step([Run(0, 1, 3)])
    serving.ffn(h, torch.zeros(4, 2 * WIDTH), mlp)
    assert_close(h[1:3], scale_mixture(base[1:3], mixture)[0])
    assert torch.equal(h[[0, 3]], base[[0, 3]])
    packed = serving.erase(0)
    assert serving.resident_bytes(0) == 0
    serving.store(2, packed)
    again = base.clone()
    serving.begin_step([Run(2, 1, 3)])
    serving.ffn(again, torch.zeros(4, 2 * WIDTH), mlp)
    assert torch.equal(again, h)
    assert serving.counters(2).sites["mlp"].decisions == 2
