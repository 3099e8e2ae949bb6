"""A rate of tokens that may be overdrawn, and is paid back before the next request."""

import math
from collections.abc import Callable


class TokenBucket:
    """Fills with `rate` tokens per second, up to those of one second; full at first.

    What a request takes is known only when it has run, so the level may fall below zero. clock:
    seconds, monotonic.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self.rate = rate
        self._clock = clock
        self._level = rate
        self._filled = clock()

    @property
    def level(self) -> float:
        """Tokens that are left; below zero those that are owed."""
        now = self._clock()
        self._level = min(self.rate, self._level + self.rate * (now - self._filled))
        self._filled = now
        return self._level

    def take(self, tokens: int) -> None:
        self._level = self.level - tokens

    @property
    def wait_seconds(self) -> int:
        """Whole seconds after which the level is above zero; 0 if it is now."""
        level = self.level
        return 0 if level > 0 else math.floor(-level / self.rate) + 1

    def at_rate(self, rate: float) -> "TokenBucket":
        """One of another rate with what is left, or owed, in this one."""
        bucket = TokenBucket(rate, self._clock)
        bucket._level = min(rate, self.level)
        return bucket
