"""A weighted sum of served adapters: how clients write it, and what it is of."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from molehill.api.adapters.errors import BadMixError

# What a mix that a request asks for is called: no adapter's name can be, so that its metrics, which
# are those of all such mixes, are no adapter's.
BY_REQUEST = "(mix)"

MOST_PARTS = 16
MOST_WEIGHT = 100.0

# A generation's digest and its weight, by digest: the same for equal mixes, however they are
# written.
Key = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MixPart:
    """generation: digest of what the name served when the mix was made."""

    name: str
    weight: float
    generation: str


@dataclass(frozen=True)
class Mix:
    """sum_i weight_i * delta_i, over at least one part."""

    parts: tuple[MixPart, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("mix: found no parts, expected at least one")

    @property
    def label(self) -> str:
        """As a header has it."""
        return ", ".join(f"{part.name}={part.weight:g}" for part in self.parts)

    @cached_property
    def key(self) -> Key:
        """Parts of the same content are one, those that add nothing none."""
        weights: defaultdict[str, float] = defaultdict(float)
        for part in self.parts:
            weights[part.generation] += part.weight
        return tuple(sorted((digest, weight) for digest, weight in weights.items() if weight))

    @property
    def lone(self) -> str | None:
        """Digest of the one part that the mix is, as its weight is 1."""
        return self.key[0][0] if len(self.key) == 1 and self.key[0][1] == 1.0 else None

    def name_of(self, digest: str) -> str:
        return next(part.name for part in self.parts if part.generation == digest)


def check_weights(given: Any) -> dict[str, float]:
    """Weights by name, as they were given. Raises BadMixError."""
    if not isinstance(given, Mapping) or not given:
        raise BadMixError(f"mix: found {shown(given)}, expected weights by the names of adapters")
    if len(given) > MOST_PARTS:
        raise BadMixError(f"mix: found {len(given)} adapters, expected at most {MOST_PARTS}")
    for name, weight in given.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        # NaN is not within anything.
        if not number or not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
            raise BadMixError(
                f"mix: {shown(name)}: found {shown(weight)}, expected a number from "
                f"{-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
    if not any(given.values()):
        raise BadMixError("mix: found weights of 0 alone, expected one that is not 0")
    return {str(name): float(weight) for name, weight in given.items()}


def parse(text: str) -> dict[str, float]:
    """Weights of `a=0.7, b=0.3`, a name's odd characters as in a URL. Raises BadMixError."""
    weights: dict[str, float] = {}
    for item in text.split(","):
        written, equals, weight = item.partition("=")
        name = unquote(written.strip())
        try:
            number = float(weight)
        except ValueError:
            number = None
        if not name or not equals or number is None:
            raise BadMixError(f"mix: found {shown(item.strip())}, expected NAME=WEIGHT")
        if name in weights:
            raise BadMixError(f"mix: found {shown(name)} twice, expected every adapter once")
        weights[name] = number
    return check_weights(weights)


def shown(value: Any) -> str:
    """As messages have it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
