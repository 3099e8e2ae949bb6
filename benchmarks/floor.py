"""The least time that a mixture can take on this machine, from what the machine was seen to do.

floor = max(bytes / bandwidth, multiply-adds / rate). Bytes are those of the routers and of every
expert that some token of the batch chose, each read once; activations are taken as cached.
Multiply-adds are those of the routers and of each token's own experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.benchmarks.race import race
from molehill.benchmarks.workload import HIDDEN, LINEARS, OPS, Layer, Point, random
from molehill.kernels import definition
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Policy

SECONDS = 0.3


class Machine:
    """What the machine does at best, measured when it is first asked for.

    rate: multiply-adds per second of a bfloat16 matrix multiplication.
    """

    def __init__(self) -> None:
        self._bandwidths: dict[int, float] = {}
        matrix, product = random(1024, 1024), random(1024, 1024)
        self.rate = 1024**3 / _best(lambda _: torch.mm(matrix, matrix, out=product))

    def bandwidth(self, size: int) -> float:
        """Bytes per second of a sum over `size` bytes, rounded up to a power of two."""
        size = 1 << (size - 1).bit_length()
        if size not in self._bandwidths:
            # Ones: the pages of fresh zeros all lie in one page of memory, until written to.
            data, total = torch.ones(size // 4), torch.zeros(())
            self._bandwidths[size] = size / _best(lambda _: torch.sum(data, 0, out=total))
        return self._bandwidths[size]


def _best(run: Callable[[int], object]) -> float:
    timing = race({"": run}, 1, SECONDS)[""]
    assert timing is not None
    return timing.best


@dataclass(frozen=True)
class Work:
    """What one layer needs, on average over the layers.

    moved: bytes. done: multiply-adds. chosen: experts per token and router. resident: bytes of all
    layers' adapters, chosen or not.
    """

    moved: float
    done: float
    chosen: float
    resident: int

    def floor(self, machine: Machine) -> tuple[float, str]:
        """Seconds, and what binds: `bytes` or `operations`."""
        reading = self.moved / machine.bandwidth(self.resident)
        multiplying = self.done / machine.rate
        return max(reading, multiplying), "bytes" if reading > multiplying else "operations"


@dataclass(frozen=True)
class Site:
    """One router, the input width that it reads, and the numbers in one of its experts."""

    router: Tensor | None
    policy: Policy
    experts: int
    inputs: int
    expert_size: int


def work(layers: Sequence[Layer], point: Point, inputs: Mapping[int, Tensor]) -> Work:
    """By the definition of the policies, not by what a backend says it did."""
    moved = done = chosen = resident = 0
    sites = [site for layer in layers for site in _sites(layer, point)]
    for site in sites:
        x = inputs[site.inputs]
        weights = definition.route(x, site.router, site.policy, site.experts).weights
        taken = weights != 0
        pairs = int(taken.sum())
        used = sum(int(taken[run.start : run.stop].any(0).sum()) for run in point.runs)
        routing = 0 if site.router is None else site.experts * site.inputs
        moved += 4 * routing * point.adapters + 2 * used * site.expert_size
        done += routing * point.tokens + pairs * site.expert_size
        chosen += pairs
        resident += point.adapters * (4 * routing + 2 * site.experts * site.expert_size)
    deep, decisions = len(layers), point.tokens * len(sites)
    return Work(moved / deep, done / deep, chosen / decisions, resident)


def _sites(layer: Layer, point: Point) -> list[Site]:
    if layer.ffn is not None:
        ffn = layer.ffn
        size = sum(_size(pair) for pair in (ffn.gate, ffn.up, ffn.down))
        return [Site(ffn.router, ffn.policy, point.experts, HIDDEN, size)]
    return [
        Site(piece.router, piece.policy, point.experts, LINEARS[name][0], _size(piece.experts))
        for name in OPS[point.op]
        for piece in layer.linears[name]
    ]


def _size(pair: Experts | None) -> int:
    return 0 if pair is None else (pair.a.numel() + pair.b.numel()) // len(pair.ranks)
