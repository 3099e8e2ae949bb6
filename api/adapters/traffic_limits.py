"""How much the requests for one adapter may take of the server."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from molehill.api.adapters.errors import BadLimitsError
from molehill.api.adapters.mix import shown

MOST_REQUESTS = 1_000_000
MOST_TOKENS = 1e9
MOST_SLOTS = 1_000_000
MOST_TENANT = 200


@dataclass(frozen=True)
class TrafficLimits:
    """None where there is no limit. tokens_per_second: of prompts and of what is generated.

    tenant: whose adapter it is. tenant_slots: it comes into the workers only as one of so many of
    that tenant's, in the place of another of them where they are as many.
    """

    requests_in_flight: int | None = None
    tokens_per_second: float | None = None
    tenant: str | None = None
    tenant_slots: int | None = None

    @property
    def of_tenant(self) -> "TrafficLimits":
        """Those that hold for whatever runs in the tenant's name."""
        return TrafficLimits(tenant=self.tenant, tenant_slots=self.tenant_slots)


NO_LIMITS = TrafficLimits()
NAMES = tuple(field.name for field in fields(TrafficLimits))
KNOWN = f"{', '.join(NAMES[:-1])} and {NAMES[-1]}"


def check_limits(given: Any) -> TrafficLimits:
    """Of a JSON value; null is without limits. Raises BadLimitsError."""
    if given is None:
        return NO_LIMITS
    if not isinstance(given, Mapping):
        raise BadLimitsError(f"limits: found {found(given)}, expected {KNOWN}")
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise BadLimitsError(
            f"limits: found an unknown field {shown(unknown[0])}, expected {KNOWN}"
        )
    requests, tokens = given.get("requests_in_flight"), given.get("tokens_per_second")
    check_number("requests_in_flight", requests, MOST_REQUESTS, whole=True)
    check_number("tokens_per_second", tokens, MOST_TOKENS)
    tenant, slots = given.get("tenant"), given.get("tenant_slots")
    check_tenant(tenant)
    check_number("tenant_slots", slots, MOST_SLOTS, whole=True)
    if slots is not None and tenant is None:
        raise BadLimitsError(
            "limits.tenant: found none beside tenant_slots, expected whose they are"
        )
    return TrafficLimits(requests, None if tokens is None else float(tokens), tenant, slots)


def check_tenant(value: Any) -> None:
    """Raises BadLimitsError."""
    if value is None:
        return
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= MOST_TENANT:
        raise BadLimitsError(
            f"limits.tenant: found {found(value)}, expected 1 to {MOST_TENANT} printable "
            "characters, or null"
        )


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
