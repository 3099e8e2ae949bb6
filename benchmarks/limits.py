"""How fast a step can be at best: what it reads and multiplies, at what the machine was seen to do.

A step takes max(bytes / bandwidth, multiply-adds / rate). Bytes are the base's weights and what the
adapters of the batch choose, each read once a step; caches, attention and activations count
nothing, so that nothing real comes near a limit of 1 in long contexts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from molehill.benchmarks.workloads import Workload
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.kernels.mixture import (
    ClassifierMixture,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
)

# Of the square matrices that are multiplied, and of what is read: larger than any cache.
WIDTH = {"cpu": 1024, "cuda": 8192}
READ = {"cpu": 1 << 28, "cuda": 1 << 30}
REPETITIONS = 5


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes per second of a long read. rate: multiply-adds per second of a square matrix
    multiplication in the serving dtype."""

    bandwidth: float
    rate: float

    @classmethod
    def seen(cls, device: str, dtype: torch.dtype) -> "Machine":
        """The best of some tries. device: cpu or cuda."""
        width = WIDTH[device]
        matrix = torch.randn(width, width, device=device).to(dtype)
        data = torch.ones(READ[device] // 4, device=device)
        multiplying = _best(lambda: matrix @ matrix, device)
        reading = _best(lambda: data.sum(), device)
        return cls(data.nbytes / reading, width**3 / multiplying)

    def seconds(self, work: "StepWork") -> float:
        return max(work.moved / self.bandwidth, work.done / self.rate)


def _best(run: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(REPETITIONS + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class StepWork:
    """moved: bytes. done: multiply-adds."""

    moved: float
    done: float

    def __add__(self, other: "StepWork") -> "StepWork":
        return StepWork(self.moved + other.moved, self.done + other.done)


@dataclass(frozen=True)
class AdapterWork:
    """Numbers in an adapter: all routers, and all experts of the sites that route (`chosen` of
    `experts`, on average) and of those that do not."""

    routers: int
    routed: int
    static: int
    experts: float

    @classmethod
    def of(cls, adapter: Adapter) -> "AdapterWork":
        routers = routed = static = 0
        experts = []
        for mixture in adapter.sites.values():
            numbers = sum(tensor.numel() for tensor in _pairs(mixture))
            if mixture.router is None:
                static += numbers
                continue
            routed += numbers
            routers += mixture.router.numel()
            experts.append(mixture.num_experts)
        return cls(routers, routed, static, sum(experts) / len(experts) if experts else 1.0)

    def step(self, tokens: int, chosen: float, itemsize: int) -> StepWork:
        """What one adapter with `tokens` tokens of a step needs.

        chosen: experts of a token; choices are taken as even and independent. itemsize: bytes of a
        number; routers have 4.
        """
        share = min(1.0, chosen / self.experts)
        touched = 1 - (1 - share) ** tokens
        moved = 4 * self.routers + itemsize * (self.static + touched * self.routed)
        return StepWork(moved, tokens * (self.routers + self.static + share * self.routed))


def _pairs(mixture: Mixture) -> list[torch.Tensor]:
    if isinstance(mixture, LinearMixture):
        stacks = [mixture.experts] + ([mixture.shared] if mixture.shared else [])
    elif isinstance(mixture, FfnMixture):
        stacks = list(mixture.experts.values())
    elif isinstance(mixture, ClassifierMixture):
        stacks = [mixture.experts]
    elif isinstance(mixture, Reflection):
        return [mixture.a, mixture.u]
    else:
        return [mixture.vectors]
    return [half for pair in stacks for half in (pair.a, pair.b)]


def base_step(base: BaseModel, config: Any, itemsize: int, workload: Workload) -> StepWork:
    """One step of the base, its head for the last tokens only.

    config: Transformers', of its text part. itemsize: bytes of a weight; quantised ones have fewer,
    so their base's limit is too low.
    """
    rows = workload.batch * (workload.prompt if workload.is_prefill else 1)
    linears = sum(inputs * outputs for inputs, outputs in base.linears.values())
    head = config.hidden_size * config.vocab_size
    moved, done = linears + head, rows * linears + workload.batch * head
    for block in base.moes.values():
        share = getattr(config, "num_experts_per_tok", block.experts) / block.experts
        numbers = 3 * block.experts * block.hidden * block.intermediate
        moved += numbers * (1 - (1 - share) ** rows)
        done += rows * share * numbers
    return StepWork(itemsize * moved, done)


def speed_limits(
    machine: Machine,
    workload: Workload,
    base: StepWork,
    adapters: list[tuple[AdapterWork, float]],
    itemsize: int,
) -> tuple[float, float]:
    """(tokens per second at most, the share of the base's own limit), for a batch over which
    `adapters`, each with the experts it chooses, are spread evenly."""
    rows = workload.batch * (workload.prompt if workload.is_prefill else 1)
    sharing = min(len(adapters), workload.batch)
    total = base
    for i in range(sharing):
        prompts = len(range(i, workload.batch, len(adapters)))
        work, chosen = adapters[i]
        total += work.step(prompts * rows // workload.batch, chosen, itemsize)
    seconds = machine.seconds(total)
    return rows / seconds, machine.seconds(base) / seconds
