"""Mixtures for the backends' tests, and what the definition makes of them."""

from collections.abc import Sequence

import torch

from molehill.kernels.interface import LinearPiece
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP
from molehill.kernels.reference import linear_mixture

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


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    assert (actual.float() - expected).abs().max().item() <= TOLERANCE[dtype] * max(scale, 1e-3)
