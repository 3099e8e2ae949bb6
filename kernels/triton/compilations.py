"""Counts the compilations of this package's kernels in a process.

Triton compiles a kernel when it is first launched with arguments of a new kind: dtypes, constants,
and whether an integer is 1 or a pointer or integer a multiple of 16. That takes seconds, which no
request should wait for.
"""

import logging
from collections.abc import Callable
from typing import Any

from triton import knobs

logger = logging.getLogger("vllm.molehill.kernels")

_PACKAGE = __name__.rpartition(".")[0]


class Compilations:
    """late: how many there were since `expect_none` was called."""

    def __init__(self) -> None:
        self.late = 0
        self._are_late = False

    def watch(self) -> None:
        """From here on, Triton tells. Another hook that is there is called too."""
        before: Callable[..., Any] | None = knobs.runtime.jit_post_compile_hook

        def hook(**event: Any) -> Any:
            self.note(event.get("fn"))
            return before(**event) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def expect_none(self) -> None:
        """All that may come is compiled; each further one is counted and logged as a warning."""
        self._are_late = True

    def note(self, function: Any) -> None:
        """One compilation. function: with `module` and `name`, as Triton's hooks get it."""
        module = str(getattr(function, "module", ""))
        if not self._are_late or not f"{module}.".startswith(f"{_PACKAGE}."):
            return
        self.late += 1
        name = getattr(function, "name", "a kernel")
        logger.warning("molehill: %s was compiled while requests waited", name)
