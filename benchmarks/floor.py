"""The least time that a mixture can take on this machine, from what the machine was seen to do.

floor = max(bytes / bandwidth, multiply-adds / rate). Bytes are those of the routers and of every
expert that some token of the batch chose, each read once; activations are taken as cached.
Multiply-adds are those of the routers and of each token's own experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from molehill.benchmarks.race import race
from molehill.benchmarks.workload import DTYPE, HIDDEN, LINEARS, OPS, AdapterLayer, Point
from molehill.kernels import reference
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Policy

SECONDS = 0.05
# A matrix multiplication's width; bytes of the smallest read, larger than a second-level cache.
WIDTH, SMALLEST = 1024, 1 << 22
# A type that multiplies so many times as slowly as the other is not observed again.
HOPELESS = 10


class ObservedMachine:
    """The best that the machine was seen to do. Observed all through a run: noise only slows.

    rate: multiply-adds per second of a square matrix multiplication, in bfloat16 or in float32,
    whichever is faster here.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        self._bandwidths: dict[int, float] = {}
        dtypes = (torch.float32, DTYPE)
        self._matrices = [torch.randn(WIDTH, WIDTH).to(dtype) for dtype in dtypes]

    def observe(self, size: int) -> None:
        """Multiplies, and reads `size` bytes."""
        rates = []
        for matrix in self._matrices:
            multiply = partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix))
            rates.append(WIDTH**3 / _best(multiply))
        self.rate = max(self.rate, *rates)
        # bfloat16 without instructions for it takes seconds, and noise hides no tenfold.
        self._matrices = [
            matrix
            for matrix, rate in zip(self._matrices, rates, strict=True)
            if rate > self.rate / HOPELESS
        ]
        size = _rounded(size)
        # Ones: the pages of fresh zeros all lie in one page of memory, until written to.
        data, total = torch.ones(size // 4), torch.zeros(())
        for read in (partial(torch.sum, data, 0, out=total), partial(torch.dot, data, data)):
            speed = size / _best(read)
            self._bandwidths[size] = max(speed, self._bandwidths.get(size, 0.0))

    def bandwidth(self, size: int) -> float:
        """Bytes per second of a reader of `size` bytes or more, where that was faster."""
        speeds = self._bandwidths.items()
        return max(speed for observed, speed in speeds if observed >= _rounded(size))


def _rounded(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _best(run: Callable[[], object]) -> float:
    timing = race({"": lambda _: run()}, 1, SECONDS, limit=math.inf)[""]
    assert timing is not None
    return timing.best


@dataclass(frozen=True)
class LayerWork:
    """What one layer needs, on average over the layers.

    moved: bytes. done: multiply-adds. chosen: experts per token and router. resident: bytes of all
    layers' adapters, chosen or not.
    """

    moved: float
    done: float
    chosen: float
    resident: int

    def floor(self, machine: ObservedMachine) -> tuple[float, str]:
        """Seconds, and what binds: `bytes` or `operations`."""
        reading = self.moved / machine.bandwidth(self.resident)
        multiplying = self.done / machine.rate
        return max(reading, multiplying), "bytes" if reading > multiplying else "operations"


@dataclass(frozen=True)
class RouterShape:
    """One router, the input width that it reads, and the numbers in one of its experts."""

    router: Tensor | None
    policy: Policy
    experts: int
    inputs: int
    expert_size: int


def work(layers: Sequence[AdapterLayer], point: Point, inputs: Mapping[int, Tensor]) -> LayerWork:
    """By the definition of the policies, not by what a backend says it did."""
    moved = done = chosen = resident = 0
    sites = [site for layer in layers for site in _sites(layer, point)]
    for site in sites:
        x = inputs[site.inputs]
        weights = reference.route(x, site.router, site.policy, site.experts).weights
        taken = weights != 0
        pairs = int(taken.sum())
        used = sum(int(taken[run.start : run.stop].any(0).sum()) for run in point.runs)
        routing = 0 if site.router is None else site.experts * site.inputs
        moved += 4 * routing * point.adapters + 2 * used * site.expert_size
        done += routing * point.tokens + pairs * site.expert_size
        chosen += pairs
        resident += point.adapters * (4 * routing + 2 * site.experts * site.expert_size)
    deep, decisions = len(layers), point.tokens * len(sites)
    return LayerWork(moved / deep, done / deep, chosen / decisions, resident)


def _sites(layer: AdapterLayer, point: Point) -> list[RouterShape]:
    if layer.ffn is not None:
        ffn = layer.ffn
        size = sum(_size(pair) for pair in (ffn.gate, ffn.up, ffn.down))
        return [RouterShape(ffn.router, ffn.policy, point.experts, HIDDEN, size)]
    return [
        RouterShape(
            piece.router, piece.policy, point.experts, LINEARS[name][0], _size(piece.experts)
        )
        for name in OPS[point.op]
        for piece in layer.linears[name]
    ]


def _size(pair: Experts | None) -> int:
    return 0 if pair is None else (pair.a.numel() + pair.b.numel()) // len(pair.ranks)
