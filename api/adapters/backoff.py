"""Pauses between tries of the same thing, each twice as long as the one before.

Not tenacity's: that calls again what it was given, in a loop of its own. Here one poll looks after
many things, and asks of each whether it is due.
"""

import math
import time


class Backoff:
    """first, last: seconds of the shortest and the longest pause. Due at once, until something is
    postponed."""

    def __init__(self, first: float, last: float) -> None:
        self._first, self._last = first, last
        self._pause = first
        self._due_at = -math.inf

    @property
    def is_due(self) -> bool:
        return self.seconds_left == 0

    @property
    def seconds_left(self) -> float:
        """Until it is due; 0 if it is."""
        return max(0.0, self._due_at - time.monotonic())

    def postpone(self) -> float:
        """It is due again after the next pause, whose seconds are returned."""
        pause, self._pause = self._pause, min(2 * self._pause, self._last)
        self._due_at = time.monotonic() + pause
        return pause

    def reset(self) -> None:
        """It came off."""
        self._pause, self._due_at = self._first, -math.inf
