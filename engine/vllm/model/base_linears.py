"""The base's linears inside molehill's own op: their GEMM and what the mixtures begin with run side
by side in a captured graph.

    main stream   ... x ── fork ── the base's GEMM ───────────── join ── finish_linear ── ...
    side stream              └── begin_linear (reads x only) ──┘

In a graph only: there the fork costs nothing, and a step's launches are short enough to hide each
other. Eager steps and long prompts, which no graph is captured for, keep one stream. A step without
rows of adapters has neither fork nor join, only the GEMM.

Sums over tensor-parallel ranks. A backend may sum router logits over the ranks
(`LinearShape.reduce`) in either half, on the stream of that half. No rank can wait for another
forever: the fork comes after every collective before it, the join before every one after it, and
the GEMM between them has none (a row-parallel linear sums its output after `quant_method.apply`).
So the collectives of one rank follow each other in one order, that of the model, and it is the same
on all ranks, which are told of the same rows and capture the same graphs. For the same reason all
linears may share scratch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.utils.multi_stream_utils import execute_in_parallel

from molehill.kernels import custom_ops
from molehill.kernels.interface import Run, SplitBackend


class Streams(Protocol):
    """Runs two functions, one after the other or side by side."""

    def run(self, base: Callable[[], Tensor], beside: Callable[[], None]) -> Tensor:
        """What `base` returns, once both are done. `beside` reads nothing that `base` writes."""


class SideStream:
    """Streams that fork while a CUDA graph is captured.

    One side stream and one pair of events serve all linears: a wait means the last record before
    it. A graph with breaks (VLLM_USE_BREAKABLE_CUDAGRAPH) may end between fork and join, so it has
    one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._fork, self._join = torch.cuda.Event(), torch.cuda.Event()

    def run(self, base: Callable[[], Tensor], beside: Callable[[], None]) -> Tensor:
        is_captured = torch.cuda.is_current_stream_capturing()
        # The side is queued first: a GEMM that came before it would take all multiprocessors.
        y, _ = execute_in_parallel(
            base,
            [beside],
            self._fork,
            [self._join],
            [self._stream],
            enable=is_captured and not BreakableCUDAGraphCapture.is_active(),
        )
        result: Tensor = y
        return result


class BaseLinears:
    """What the op `molehill::base_linear` runs: linears of the base with their mixtures."""

    def __init__(self, backend: SplitBackend, streams: Streams) -> None:
        self._backend, self._streams = backend, streams
        self._linears: dict[int, tuple[Any, Any]] = {}
        self._is_plain = True
        self.op: Callable[..., Any] = torch.ops.molehill.base_linear.default
        custom_ops.install_linears(self.run)

    def add(self, handle: int, module: Any) -> None:
        """A vLLM linear, with its quant method as it is now."""
        self._linears[handle] = module, module.quant_method

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward, as to the backend."""
        self._is_plain = not runs

    def run(self, x: Tensor, bias: Tensor | None, handle: int) -> Tensor:
        """y `[..., out]` of x `[..., in]`."""
        module, method = self._linears[handle]
        if self._is_plain:
            plain: Tensor = method.apply(module, x, bias)
            return plain
        rows, backend = x.flatten(0, -2), self._backend
        y = self._streams.run(
            lambda: method.apply(module, x, bias), lambda: backend.begin_linear(rows, handle)
        ).contiguous()
        backend.finish_linear(y.flatten(0, -2), rows, handle)
        return y
