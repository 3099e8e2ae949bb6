"""How much the requests for one adapter may take of the server."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from molehill.api.adapters.errors import BadLimitsError
from molehill.api.adapters.mix import shown

MOST_REQUESTS = 1_000_000
MOST_TOKENS = 1e9


@dataclass(frozen=True)
class TrafficLimits:
    """None where there is no limit. tokens_per_second: of prompts and of what is generated."""

    requests_in_flight: int | None = None
    tokens_per_second: float | None = None


NO_LIMITS = TrafficLimits()
NAMES = tuple(field.name for field in fields(TrafficLimits))


def check_limits(given: Any) -> TrafficLimits:
    """Of a JSON value; null is without limits. Raises BadLimitsError."""
    if given is None:
        return NO_LIMITS
    if not isinstance(given, Mapping):
        raise BadLimitsError(f"limits: found {found(given)}, expected {' and '.join(NAMES)}")
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise BadLimitsError(
            f"limits: found an unknown field {shown(unknown[0])}, expected {' and '.join(NAMES)}"
        )
    requests, tokens = given.get("requests_in_flight"), given.get("tokens_per_second")
    check_number("requests_in_flight", requests, MOST_REQUESTS, whole=True)
    check_number("tokens_per_second", tokens, MOST_TOKENS)
    return TrafficLimits(requests, None if tokens is None else float(tokens))


def check_number(name: str, value: Any, most: float, whole: bool = False) -> None:
    """Raises BadLimitsError."""
    if value is None:
        return
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # NaN is not within anything.
    if not number or not 1 <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise BadLimitsError(
            f"limits.{name}: found {found(value)}, expected {kind} from 1 to {most:.0f}, or null"
        )


def found(value: Any) -> str:
    """As messages have it. Python writes no integer of thousands of digits."""
    huge = isinstance(value, int) and value.bit_length() > 64
    return f"a number of {value.bit_length()} bits" if huge else shown(value)
