"""Arrow routing over LoRAs (arXiv 2405.11157), as PEFT's `create_arrow_model` does it.

No router was trained: an expert's router row is the direction of the input that its delta answers
to most, the first right singular vector of B A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import ShapeError, UnknownTargetError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.transform.weighted_sum import (
    Part,
    check_alike,
    common_base,
    low_rank,
    stack_up,
    warnings,
)
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Arrow


@dataclass(frozen=True)
class Lora:
    """A LoRA and, by site, the factor (alpha / r) that is folded into its B."""

    name: str
    adapter: Adapter
    factors: Mapping[str, float]


def arrow(tasks: Sequence[Lora], policy: Arrow, general: Sequence[Lora] = ()) -> Adapter:
    """A mixture of the tasks' LoRAs, which adapt the same linears.

    general: their mean A and mean B, before any factor, are subtracted from A and B of every task
    (general knowledge subtraction); then all ranks of a linear are one rank. Raises
    UnsupportedError for what is no LoRA, UnknownTargetError and ShapeError where adapters differ.
    """
    everyone = [*tasks, *general]
    for lora in everyone:
        for site in lora.adapter.biases:
            found = "a bias, which Arrow's routing has no gate weight for"
            raise UnsupportedError(f"{lora.name}: {site}.bias", found, "LoRAs without biases")
    first_sites = set(tasks[0].adapter.sites)
    for lora in everyone:
        for site in sorted(first_sites ^ set(lora.adapter.sites)):
            found = "adapted by some of the adapters only"
            raise UnknownTargetError(f"{lora.name}: {site}", found, "the same linears in all")
    sites = {site: _mixture(site, tasks, general, policy) for site in tasks[0].adapter.sites}
    parts = [Part(lora.name, lora.adapter, 1.0) for lora in everyone]
    adapters = [lora.adapter for lora in everyone]
    return Adapter("arrow", sites, common_base(adapters), warnings(parts))


def _mixture(
    site: str, tasks: Sequence[Lora], general: Sequence[Lora], policy: Arrow
) -> LinearMixture:
    experts = [_pair(lora, site) for lora in tasks]
    for lora, expert in zip(tasks, experts, strict=True):
        check_alike(lora.name, site, expert, experts[0])
    if general:
        mean = _mean(site, general, experts[0])
        experts = [
            _subtract(lora, site, expert, mean) for lora, expert in zip(tasks, experts, strict=True)
        ]
    router = torch.stack([prototype(expert.a, expert.b) for expert in experts])
    return LinearMixture(stack_up(experts), policy, router)


def _pair(lora: Lora, site: str) -> Experts:
    pair = low_rank(lora.name, site, lora.adapter.sites[site])
    return Experts(pair.a, pair.b, (sum(pair.ranks),))


def _mean(site: str, general: Sequence[Lora], like: Experts) -> tuple[Tensor, Tensor]:
    """A and B of the general adapters, less their factors, on the average."""
    pairs = [_pair(lora, site) for lora in general]
    for lora, pair in zip(general, pairs, strict=True):
        check_alike(lora.name, site, pair, like)
        _check_rank(lora, site, pair, like)
    a = torch.stack([pair.a for pair in pairs])
    b = torch.stack(
        [pair.b / lora.factors[site] for lora, pair in zip(general, pairs, strict=True)]
    )
    return a.mean(0), b.mean(0)


def _subtract(lora: Lora, site: str, pair: Experts, mean: tuple[Tensor, Tensor]) -> Experts:
    a, b = mean
    _check_rank(lora, site, pair, Experts(a, b, (a.shape[0],)))
    return Experts(pair.a - a, pair.b - b * lora.factors[site], pair.ranks)


def _check_rank(lora: Lora, site: str, pair: Experts, like: Experts) -> None:
    if pair.ranks != like.ranks:
        where, expected = f"{lora.name}: {site}.a", f"the other adapters' {like.ranks[0]}"
        raise ShapeError(
            where, f"rank {pair.ranks[0]}", f"{expected}, as general ones are subtracted"
        )


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """The first right singular vector of B A: float32 `[in]`, of length 1, or 0 if B A is.

    a `[r, in]`, b `[out, r]`. With A^T = Q_a R_a and B = Q_b R_b it is Q_a times that of the r x r
    matrix R_b R_a^T. Its sign, which no score depends on, makes the largest element positive.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    _, r_b = torch.linalg.qr(b.double())
    _, values, right = torch.linalg.svd(r_b @ r_a.T)
    vector = q_a @ right[0] if values[0] > 0 else torch.zeros_like(q_a[:, 0])
    return (vector * vector[vector.abs().argmax()].sign()).float()
