"""Low-rank pairs as files name them, and their way into `Experts`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import NonFiniteError, ShapeError
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.kernels.mixture import Experts


@dataclass(frozen=True)
class PairNames:
    """The names of A `[r, in]` and B `[out, r]` in a file."""

    a: str
    b: str


@dataclass(frozen=True)
class Scaling:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""

    alpha: float
    rank: int
    rslora: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def read_scaling(config: Fields) -> Scaling:
    """From `lora_alpha`, `r`, `use_rslora`. Raises ConfigError."""
    alpha = config.number("lora_alpha", above=0)
    return Scaling(alpha, config.integer("r"), config.flag("use_rslora"))


def build_experts(weights: Weights, pairs: Sequence[PairNames], scaling: Scaling) -> Experts:
    """Stacks pairs that share a scaling, folding it into B in float32.

    The rank is the tensors'; one that differs from the config's leaves the scaling in doubt.
    Raises MissingTensorError, NonFiniteError, ShapeError.
    """
    scaled = [_read_pair(weights, pair, scaling) for pair in pairs]
    first_a, first_b = scaled[0]
    for pair, (a, b) in zip(pairs, scaled, strict=True):
        _check(weights.where(pair.a), a, [a.shape[0], first_a.shape[1]])
        _check(weights.where(pair.b), b, [first_b.shape[0], b.shape[1]])
    ranks = tuple(a.shape[0] for a, _ in scaled)
    return Experts(
        torch.cat([a for a, _ in scaled]), torch.cat([b for _, b in scaled], dim=1), ranks
    )


def _read_pair(weights: Weights, pair: PairNames, scaling: Scaling) -> tuple[Tensor, Tensor]:
    a, b = weights.tensor(pair.a, 2), weights.tensor(pair.b, 2)
    _check(weights.where(pair.b), b, [b.shape[0], a.shape[0]])
    if a.shape[0] != scaling.rank:
        raise ShapeError(
            weights.where(pair.a), f"rank {a.shape[0]}", f"the config's rank {scaling.rank}"
        )
    scaled: Tensor = b * scaling.factor
    if not bool(torch.isfinite(scaled).all()):
        found = f"Inf once scaled by {scaling.factor:g}"
        raise NonFiniteError(weights.where(pair.b), found, "finite values")
    return a, scaled


def read_router(weights: Weights, name: str, inputs: int) -> Tensor:
    """A gate `[E, inputs]`. Raises MissingTensorError, ShapeError."""
    router = weights.tensor(name, 2)
    _check(weights.where(name), router, [router.shape[0], inputs])
    return router


def _check(where: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ShapeError(where, list(tensor.shape), expected)
