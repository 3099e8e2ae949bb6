"""`rank_pattern` and `alpha_pattern`: values for the modules whose names end in a pattern.

PEFT's rule: the first pattern p for which `(.*\\.)?(p)$` matches the name, a dot being any
character. A large mixture-of-experts model has tens of thousands of names and as many patterns, so
plain ones, of letters, digits and dots, are looked up by what they say between their dots.
"""

import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.formats.io.fields import Fields

T = TypeVar("T")
_PLAIN = re.compile(r"[\w.]+")


class Patterns(Generic[T]):
    """Values by pattern, in the file's order."""

    def __init__(self, values: Mapping[str, T]) -> None:
        # By where the dots are: what is between them, to the pattern's place and its value.
        self._plain: dict[tuple[int, ...], dict[str, tuple[int, T]]] = {}
        self._others: list[tuple[int, re.Pattern[str], T]] = []
        for place, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                same = self._plain.setdefault(_shape(pattern), {})
                same.setdefault(pattern, (place, value))
            else:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
                self._others.append((place, compiled, value))

    def get(self, module: str, default: T) -> T:
        """The value of the first pattern that matches a module's name."""
        found = [(place, value) for place, p, value in self._others if p.match(module)]
        for (length, *dots), same in self._plain.items():
            head, tail = module[: len(module) - length], module[len(module) - length :]
            if len(module) == length or (len(module) > length and head.endswith(".")):
                hit = same.get(_with_dots(tail, dots))
                found += [hit] if hit else []
        return min(found, key=lambda hit: hit[0])[1] if found else default


def _shape(pattern: str) -> tuple[int, ...]:
    """Length and places of the dots."""
    return len(pattern), *(i for i, character in enumerate(pattern) if character == ".")


def _with_dots(name: str, places: list[int]) -> str:
    characters = list(name)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def check(config: Fields, name: str) -> Fields:
    """The object of patterns `name`; raises ConfigError, UnsupportedError for a bad pattern.

    Two repetitions, or many alternatives, can take a regular expression forever.
    """
    patterns = config.object(name)
    for pattern in patterns.values:
        where = f"{config.where}: pattern {pattern[:80]!r}"
        if len(re.findall(r"[*+?{]", pattern)) > 1 or pattern.count("|") > 8:
            expected = "at most one repetition and 8 alternatives"
            raise UnsupportedError(where, "a complex one", expected)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(where, error, "a regular expression") from None
    return patterns
