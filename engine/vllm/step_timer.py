"""How long a worker's steps take, and the adapter ops inside them."""

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any


class StepTimer:
    """Seconds of wall time in a model runner's steps since it was put on the runner.

    For devices on which a step has ended when its call returns. Time between steps, warm-up and
    profiling runs do not count. steps: forward passes and sampling. ops: adapter ops in them.
    """

    def __init__(self, runner: Any, op_seconds: Callable[[], float | None]) -> None:
        """op_seconds: what the ops took so far."""
        self.steps = 0.0
        self.ops = 0.0
        self._op_seconds = op_seconds
        # The runner's methods, not the worker's: no path leads past them, and a pipeline stage's
        # wait for its input is not in them.
        for name in ("execute_model", "sample_tokens"):
            setattr(runner, name, self._timed(getattr(runner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, before = perf_counter(), self._op_seconds() or 0.0
            try:
                return method(*args, **kwargs)
            finally:
                self.steps += perf_counter() - start
                self.ops += (self._op_seconds() or 0.0) - before

        return timed
