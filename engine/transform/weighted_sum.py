"""Static mixes: one adapter that adds up several LoRAs, each times a number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import ConfigError, ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter, bias_tensor
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
)
from molehill.kernels.policy import Constant


@dataclass(frozen=True)
class Part:
    """One adapter of a mix. name: what errors call it. scale: any finite number."""

    name: str
    adapter: Adapter
    scale: float


def mix(parts: Sequence[Part]) -> Adapter:
    """The adapter whose delta is sum_i scale_i * delta_i, exactly, on every linear.

    A linear's experts are those of all parts that adapt it, scales folded into B; biases that they
    add are summed likewise. The result is not checked against limits. Raises ConfigError without
    parts, UnsupportedError for a part that is no LoRA (named, with the reason), ShapeError where
    two parts disagree.
    """
    if not parts:
        raise ConfigError("mix", "no adapters", "at least one")
    stacks: dict[str, list[Experts]] = {}
    for part in parts:
        check_no_table(part.name, part.adapter)
        for site in part.adapter.rows:
            found, expected = "rows of its own, which do not add up", "a LoRA's pairs alone"
            raise UnsupportedError(f"{part.name}: {site}", found, expected)
        for site, mixture in part.adapter.sites.items():
            pair = low_rank(part.name, site, mixture)
            scaled = Experts(pair.a, pair.b * part.scale, pair.ranks)
            stack = stacks.setdefault(site, [])
            if stack:
                check_alike(part.name, site, scaled, stack[0])
            stack.append(scaled)
    sites = {site: _constant(stack_up(stack)) for site, stack in stacks.items()}
    adapters = [part.adapter for part in parts]
    return Adapter("mix", sites, common_base(adapters), warnings(parts), biases=_biases(parts))


def _biases(parts: Sequence[Part]) -> dict[str, Bias]:
    """Raises UnsupportedError for a part with trained biases of the base's, ShapeError."""
    total: dict[str, Tensor] = {}
    for part in parts:
        check_no_trained_bias(part.name, part.adapter)
        for site, bias in part.adapter.biases.items():
            if bias.added is None:
                continue
            scaled = bias.added * part.scale
            before = total.get(site, torch.zeros_like(scaled))
            if before.shape != scaled.shape:
                where, expected = f"{part.name}: {bias_tensor(site, 'added')}", list(before.shape)
                raise ShapeError(where, list(scaled.shape), f"the other adapters' {expected}")
            total[site] = before + scaled
    return {site: Bias(added=tensor) for site, tensor in total.items()}


def check_no_table(name: str, adapter: Adapter) -> None:
    """Raises UnsupportedError for a part that is other adapters, by token ids."""
    if adapter.by_token is not None:
        found, expected = "adapters that tokens have by their ids", "one for every token"
        raise UnsupportedError(f"{name}: token_adapters", found, expected)


def check_no_trained_bias(name: str, adapter: Adapter) -> None:
    """A part of one would need the base's own, beside which it was trained. Raises
    UnsupportedError."""
    for site, bias in adapter.biases.items():
        if bias.trained is not None:
            where, found = f"{name}: {site}.bias", "a trained bias of the base in a mix"
            raise UnsupportedError(where, found, "bias 'none' in every adapter of it")


def low_rank(name: str, site: str, mixture: Mixture) -> Experts:
    """A static site's pairs, constant gate weights folded into B.

    Raises UnsupportedError if what the site adds is not one product B A, whatever the token.
    """
    where, expected = f"{name}: {site}", "a LoRA's, which is the same for every token"
    if isinstance(mixture, FfnMixture):
        raise UnsupportedError(where, "a mixture of whole FFNs", expected)
    if isinstance(mixture, ClassifierMixture):
        raise UnsupportedError(where, "gate weights that a classifier gives (X-LoRA)", expected)
    if isinstance(mixture, Reflection):
        raise UnsupportedError(where, "a reflection (HRA), which does not add up", expected)
    constant = mixture.policy.constant_weights
    if isinstance(mixture, ScaleMixture) and mixture.num_experts == 1:
        raise UnsupportedError(where, "a vector that scales, which does not add up", expected)
    if isinstance(mixture, ScaleMixture) or mixture.router is not None or constant is None:
        found = f"a mixture that reads the token ({type(mixture.policy).__name__})"
        raise UnsupportedError(where, found, expected)
    if mixture.magnitude is not None:
        raise UnsupportedError(where, "a DoRA magnitude, which does not add up", expected)
    experts = mixture.experts
    weights = torch.tensor(constant)[experts.expert_of_row]
    return Experts(experts.a, experts.b * weights, experts.ranks)


def check_alike(name: str, site: str, pair: Experts, first: Experts) -> None:
    """Two parts' pairs must be of the same linear. Raises ShapeError."""
    for half, width, expected in (
        ("a", pair.a.shape[1], first.a.shape[1]),
        ("b", pair.b.shape[0], first.b.shape[0]),
    ):
        if width != expected:
            where = f"{name}: {site}.{half}"
            raise ShapeError(where, f"width {width}", f"the other adapters' {expected}")


def stack_up(stack: Iterable[Experts]) -> Experts:
    """All experts side by side."""
    pairs = list(stack)
    a, b = torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1)
    return Experts(a, b, tuple(rank for pair in pairs for rank in pair.ranks))


def _constant(experts: Experts) -> LinearMixture:
    return LinearMixture(experts, Constant((1.0,) * len(experts.ranks)))


def common_base(adapters: Iterable[Adapter]) -> str | None:
    """The base model that all adapters name which name one."""
    names = {adapter.base_model for adapter in adapters} - {None}
    return names.pop() if len(names) == 1 else None


def warnings(parts: Iterable[Part]) -> tuple[str, ...]:
    """The parts' own, by name."""
    return tuple(f"{part.name}: {text}" for part in parts for text in part.adapter.warnings)
