"""Typed access to the fields of a JSON object."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molehill.engine.adapter.errors import ConfigError, UnsupportedError

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands. A field that is null counts as absent.

    Every getter raises ConfigError, naming the field, on a wrong type or range, and when a field
    without a default is absent.
    """

    where: str
    values: Mapping[str, Any]

    def error(self, name: str, expected: object) -> ConfigError:
        value = self.values.get(name)
        found = "nothing" if name not in self.values else shortened(value)
        return ConfigError(f"{self.where}: {name}", found, expected)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any, expected: str) -> Any:
        if self.has(name):
            return self.values[name]
        if default is _REQUIRED:
            raise self.error(name, expected)
        return default

    def integer(self, name: str, default: int = _REQUIRED) -> int:
        """A whole number of at least 1."""
        expected = "a whole number of at least 1"
        value = self._get(name, default, expected)
        if not _is_number(value) or value != int(value) or value < 1:
            raise self.error(name, expected)
        return int(value)

    def number(
        self,
        name: str,
        default: float = _REQUIRED,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        at_most: float = math.inf,
    ) -> float:
        """A finite number within the bounds."""
        expected = f"a number{_bounds(above, at_least, at_most)}"
        value = self._get(name, default, expected)
        if not _is_number(value) or not (above < value and at_least <= value <= at_most):
            raise self.error(name, expected)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self._get(name, None, "a string")
        if value is not None and not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty when absent or false."""
        value = self._get(name, [], "a list of strings") or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(name, "a list of strings")
        return value

    def choice(self, name: str, known: Sequence[str], default: str = _REQUIRED) -> str:
        expected = f"one of {', '.join(known)}"
        value = self._get(name, default, expected)
        if value not in known:
            raise self.error(name, expected)
        return str(value)

    def object(self, name: str) -> "Fields":
        """A nested object; empty when absent."""
        value = self._get(name, {}, "an object")
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(f"{self.where}: {name}", value)

    def items(self, name: str) -> "Fields":
        """A nested list as an object, with the places from 0 on as names."""
        value = self._get(name, _REQUIRED, "a list")
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return Fields(f"{self.where}: {name}", {str(i): item for i, item in enumerate(value)})

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers, not empty."""
        items = self.items(name)
        if not items.values:
            raise self.error(name, "a list of numbers")
        return [items.number(place) for place in items.values]

    def only(self, *names: str) -> None:
        """Raises UnsupportedError for the first field that is none of these."""
        for name in sorted(self.values):
            if name not in names:
                where = f"{self.where}: {name[:80]}"
                raise UnsupportedError(where, "an unknown field", f"one of {', '.join(names)}")

    def refuse(self, meanings: Mapping[str, str], remedies: Mapping[str, str] = {}) -> None:
        """Raises UnsupportedError for the first of these fields that is set, by its meaning, and
        with what would make it servable where there is something."""
        for name, meaning in meanings.items():
            if self.values.get(name) not in (None, False, [], {}):
                expected = "; or ".join(
                    filter(None, ["the field absent or false", remedies.get(name)])
                )
                raise UnsupportedError(f"{self.where}: {name}", meaning, expected)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _bounds(above: float, at_least: float, at_most: float) -> str:
    parts = []
    if above > -math.inf:
        parts.append(f" above {above:g}")
    if at_least > -math.inf:
        parts.append(f" of at least {at_least:g}")
    if at_most < math.inf:
        parts.append(f" of at most {at_most:g}")
    return " and".join(parts)


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
