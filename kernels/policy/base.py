"""What every policy is, and the steps that several have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided. `...` are the probabilities' leading axes.

    weights: float32 `[..., E]`, 0 for an expert that was not chosen.
    entropy: float32 `[...]`, entropy of the probabilities over its maximum (0 for one expert).
    soft:    bool `[...]`, whether the token fell back to soft routing (DynMoLE).
    """

    weights: Tensor
    entropy: Tensor
    soft: Tensor


def shannon(probabilities: Tensor) -> Tensor:
    """Shannon entropy of `[..., E]` divided by ln E: `[...]` in [0, 1]; 0 when E is 1."""
    experts = probabilities.shape[-1]
    if experts == 1:
        return torch.zeros_like(probabilities[..., 0])
    total: Tensor = torch.special.entr(probabilities).sum(-1)
    return total / math.log(experts)


def never_soft(probabilities: Tensor) -> Tensor:
    return torch.zeros_like(probabilities[..., 0], dtype=torch.bool)


def ranked(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Values and expert indices by falling probability, ties by index."""
    return torch.sort(probabilities, dim=-1, descending=True, stable=True)


def unranked(values: Tensor, order: Tensor) -> Tensor:
    """Puts values sorted by `ranked` back at their experts' places."""
    return torch.zeros_like(values).scatter(-1, order, values)


def divided_by_sum(kept: Tensor) -> Tensor:
    """Rows `[..., E]` that sum to 1; a row of zeros stays one."""
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


class JsonFields(Protocol):
    """The fields of a JSON object. Each raises for a value of another type or beyond the bounds,
    naming the field, and for an absent one that has no default."""

    def integer(self, name: str, default: int = ...) -> int:
        """A whole number of at least 1."""

    def number(
        self,
        name: str,
        default: float = ...,
        *,
        above: float = ...,
        at_least: float = ...,
        at_most: float = ...,
    ) -> float:
        """A finite number."""

    def numbers(self, name: str) -> Sequence[float]:
        """A list of finite numbers, not empty."""

    def flag(self, name: str, default: bool = ...) -> bool: ...

    def choice(self, name: str, known: Sequence[str], default: str = ...) -> str: ...


@dataclass(frozen=True)
class Policy(ABC):
    """What a policy is unless it says otherwise: a function of p = softmax(logits).

    Its class name and its fields' names are part of the file format and of every digest.
    """

    @classmethod
    @abstractmethod
    def from_json(cls, fields: JsonFields) -> Self:
        """The inverse of `to_json`. An absent field has the class's default, if there is one."""

    def to_json(self) -> dict[str, Any]:
        """Its class name under `policy`, and its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"policy": type(self).__name__, **values}

    @property
    @abstractmethod
    def sums_to_one(self) -> bool:
        """Whether the weights sum to 1 for every token, whatever the router."""

    def most_experts(self, experts: int) -> int:
        """The most experts, of so many, that one token can have."""
        return experts

    def fewest_experts(self, experts: int) -> int:
        """The fewest experts, of so many, that one token can have, but for weights that are too
        small for float32; 0 where it hangs on the token."""
        return 0

    @property
    def constant_weights(self) -> tuple[float, ...] | None:
        """Gate weights `[E]` that no token changes; None where a router decides. A router and
        constant weights exclude each other, and there is always one of the two."""
        return None

    @property
    def only_experts(self) -> int | None:
        """The number of experts that it is for; None if it can be over any."""
        return None if self.constant_weights is None else len(self.constant_weights)

    @property
    def extra_rows(self) -> int:
        """Router rows after the experts'."""
        return 0

    @property
    def num_parameters(self) -> int:
        """Numbers that it learned beside the router."""
        return 0

    def decide(self, logits: Tensor, parameters: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Probabilities `[..., E]` and the routing of float32 logits `[..., E + extra_rows]`.

        parameters: float32 `[..., num_parameters]`, whose leading axes broadcast against the
        logits'; None if there are none.
        """
        probabilities = torch.softmax(logits, dim=-1)
        return probabilities, self.route(probabilities)

    def route(self, probabilities: Tensor) -> Routing:
        """Of `[..., E]`. Every policy has its own; this base class decides nothing."""
        raise NotImplementedError

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Of `[..., E]`, as `decide` reports it: `[...]`."""
        return shannon(probabilities)
