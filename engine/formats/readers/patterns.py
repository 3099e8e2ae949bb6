"""Regular expressions of a stranger's, matched against module names in bounded time.

PEFT matches with Python's `re`, which some patterns keep busy for ever. RE2 takes time linear in
the name and means the same by what it takes; what it does not take (lookarounds and
back-references, such as `^(?!.*visual).*`) is matched by `regex`, which can be stopped.
"""

import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import re2
import regex

from molehill.engine.adapter.errors import ConfigError, LimitError
from molehill.engine.formats.io.fields import Fields, shortened

T = TypeVar("T")

# For all patterns of one config, on all modules of its file.
_SECONDS = 5.0
_LONGEST = 1 << 14
_RE2_BYTES = 64 << 20
# Letters, digits, dots that stand for any character, and escaped ones that do not.
_PLAIN = re.compile(r"(?:[\w.]|\\\.)+", re.ASCII)
# What RE2 takes and reads in another way than Python: `x{,3}`, from none to three.
_READ_OTHERWISE = "{,"
# `[[:alpha:]]` is a class to RE2 and `regex`, and letters to Python.
_POSIX_CLASS = "[:"


class Clock:
    """What is left of the time for all patterns of one config."""

    def __init__(self) -> None:
        self._left = _SECONDS

    def run(self, where: str, match: Callable[[float], Any]) -> Any:
        """What `match` gives of the seconds that are left. Raises LimitError."""
        start = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            return match(self._left)
        except TimeoutError:
            expected = f"at most {_SECONDS:g} seconds for all modules"
            raise LimitError(where, "a pattern that takes longer", expected) from None
        finally:
            self._left -= time.monotonic() - start


class Pattern:
    """One regular expression of Python's `re`, of the field `where`."""

    def __init__(self, where: str, pattern: str, clock: Clock, shown: str | None = None) -> None:
        """shown: the part of `pattern` that the config holds, if not all of it.

        Raises ConfigError, LimitError.
        """
        shown = pattern if shown is None else shown
        if len(shown) > _LONGEST:
            expected = f"at most {_LONGEST}"
            raise LimitError(where, f"a pattern of {len(shown)} characters", expected)
        if _POSIX_CLASS in pattern:
            raise ConfigError(where, shortened(shown), f"a pattern without `{_POSIX_CLASS}`")
        self._where, self._clock = where, clock
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(pattern)
            self._re2 = _compiled_by_re2(pattern)
            self._regex = regex.compile(pattern) if self._re2 is None else None
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            found = f"{shortened(shown)} ({error})"
            raise ConfigError(where, found, "a regular expression") from None

    def fullmatch(self, text: str) -> bool:
        return self._run("fullmatch", text) is not None

    def match(self, text: str) -> Any:
        """At the start of the text, as `re.match`."""
        return self._run("match", text)

    def _run(self, method: str, text: str) -> Any:
        def match(seconds: float) -> Any:
            if self._re2 is not None:
                return getattr(self._re2, method)(text)
            return getattr(self._regex, method)(text, timeout=seconds, concurrent=True)

        return self._clock.run(self._where, match)


def _compiled_by_re2(pattern: str) -> Any:
    """None for what RE2 does not take, or reads in another way."""
    if _READ_OTHERWISE in pattern:
        return None
    options = re2.Options()
    options.log_errors, options.max_mem = False, _RE2_BYTES
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return None


class Patterns(Generic[T]):
    """`rank_pattern` and `alpha_pattern`: values for the modules whose names end in a pattern.

    PEFT's rule: the first pattern p for which `(.*\\.)?(p)$` matches the name, a dot being any
    character. A large mixture-of-experts model has tens of thousands of names and as many patterns,
    so plain ones are looked up by what they say between their dots.
    """

    def __init__(self, where: str, values: Mapping[str, T]) -> None:
        """values: by pattern, in the file's order. Raises ConfigError, LimitError."""
        # By length and where the dots are: what is between them, to the pattern's place and value.
        self._plain: dict[tuple[int, ...], dict[str, tuple[int, T]]] = {}
        self._others: list[tuple[int, Pattern, T]] = []
        clock = Clock()
        for place, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                literal, dots = _parse_plain(pattern)
                same = self._plain.setdefault((len(literal), *dots), {})
                same.setdefault(literal, (place, value))
            else:
                compiled = Pattern(where, rf"(.*\.)?({pattern})$", clock, pattern)
                self._others.append((place, compiled, value))

    def get(self, module: str, default: T) -> T:
        """The value of the first pattern that matches a module's name. Raises LimitError."""
        others = ((place, value) for place, p, value in self._others if p.match(module))
        matches = list(filter(None, [next(others, None)]))
        for (length, *dots), same in self._plain.items():
            head, tail = module[: len(module) - length], module[len(module) - length :]
            if len(module) == length or (len(module) > length and head.endswith(".")):
                match = same.get(_with_dots(tail, dots))
                matches += [match] if match else []
        return min(matches, key=lambda match: match[0])[1] if matches else default


def _parse_plain(pattern: str) -> tuple[str, list[int]]:
    """The pattern without backslashes, and the places of the dots that stand for any character."""
    literal, dots = "", []
    for part in re.findall(r"\\\.|.", pattern):
        if part == ".":
            dots.append(len(literal))
        literal += part[-1]
    return literal, dots


def _with_dots(name: str, places: list[int]) -> str:
    characters = list(name)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def read_ranks(config: Fields) -> Patterns[int]:
    """`rank_pattern`. Raises ConfigError, LimitError."""
    ranks = config.object("rank_pattern")
    return Patterns(ranks.where, {pattern: ranks.integer(pattern) for pattern in ranks.values})


def read_alphas(config: Fields) -> Patterns[float]:
    """`alpha_pattern`. Raises ConfigError, LimitError."""
    alphas = config.object("alpha_pattern")
    values = {pattern: alphas.number(pattern, above=0) for pattern in alphas.values}
    return Patterns(alphas.where, values)
