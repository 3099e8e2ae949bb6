"""Timing by turns: every contestant meets the same noise of the machine."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

# Seconds. A contestant whose single call takes longer than LIMIT is not timed.
LIMIT, TURN = 1.0, 0.1
LEAST_TURNS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all turns."""

    best: float
    median: float


@dataclass(frozen=True)
class LayerRunner:
    """Goes on through its layers, `calls` of them a turn."""

    run: Callable[[int], object]
    layers: Iterator[int]
    calls: int

    def turn(self) -> float:
        """Seconds per call of one turn."""
        start = time.perf_counter()
        for layer in itertools.islice(self.layers, self.calls):
            self.run(layer)
        return (time.perf_counter() - start) / self.calls


def race(
    runs: Mapping[str, Callable[[int], object]],
    depth: int,
    budget: float,
    limit: float = LIMIT,
) -> dict[str, Timing | None]:
    """Times `run(layer)` of each for `budget` seconds in all, and LEAST_TURNS turns at least.

    A turn goes through all `depth` layers, or as many as fit into TURN seconds. None if one call
    takes over `limit` seconds.
    """
    contestants = {name: _warm(run, depth, limit) for name, run in runs.items()}
    turns: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= LEAST_TURNS and time.perf_counter() - start > budget:
            break
        for name, contestant in contestants.items():
            if contestant:
                turns[name].append(contestant.turn())
    return {
        name: Timing(min(seconds), statistics.median(seconds)) if seconds else None
        for name, seconds in turns.items()
    }


def _warm(run: Callable[[int], object], depth: int, limit: float) -> LayerRunner | None:
    layers = itertools.cycle(range(depth))
    seconds = LayerRunner(run, layers, 1).turn()
    if seconds > limit:
        return None
    seconds = min(seconds, LayerRunner(run, layers, 1).turn())
    return LayerRunner(run, layers, max(1, min(depth, int(TURN / seconds))))
