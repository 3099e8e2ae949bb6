"""One server as its requests feel it: molehill's residency over workers that only take time."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Content, Generation
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import GenerationStatus
from molehill.api.adapters.traffic import AdapterTraffic
from molehill.api.adapters.workers import Uninstalled
from molehill.engine.routing_stats import Costs
from molehill.engine.vllm.host_cache import HostCache, PreparedAdapter
from molehill.engine.vllm.prefetch import AT_ONCE
from molehill.kernels.interface import SlotWeights

SOURCE = Source(Path(), "simulated")
CONTENT = Content("", "lora", 0, (), {}, Path())


@dataclass(frozen=True)
class Sizing:
    """What one server is given. host_copies: adapters that `--adapter-host-memory` has room for.

    read_seconds: a worker reads an adapter from the store and makes it ready, beside steps.
    install_seconds: one leaves its slot, another is copied into it, between steps. answer_seconds:
    of a request in the engine. sequences: requests that the engine runs at a time.
    """

    slots: int
    host_copies: int
    read_seconds: float
    install_seconds: float
    answer_seconds: float
    sequences: int


class Visit(NamedTuple):
    """A request: where it found its adapter, and the seconds until that was in a slot."""

    tier: Tier
    seconds: float


class SimulatedRequest(NamedTuple):
    """In the place of vLLM's LoRARequest."""

    lora_int_id: int


class SimulatedWorkers:
    """See Workers. Adapters are of one size, and its unit."""

    at_once = AT_ONCE

    def __init__(self, sizing: Sizing) -> None:
        self._sizing = sizing
        self._host = HostCache[int](sizing.host_copies)
        empty = torch.empty(0)
        costs = Costs({}, empty, empty, {}, 0)
        self._copy = PreparedAdapter(costs, {}, 1, is_empty=False, weights=SlotWeights({}, {}))

    async def start_prepare(self, request: Any) -> bool:
        return request.lora_int_id not in self._host

    async def prepare(self, request: Any) -> Tier:
        if not await self.start_prepare(request):
            return "host"
        await asyncio.sleep(self._sizing.read_seconds)
        return "disk"

    async def discard(self, request: Any) -> None:
        """Nothing is kept that was prepared and did not come in."""

    async def install(self, request: Any) -> None:
        await asyncio.sleep(self._sizing.install_seconds)
        self._host.drop(request.lora_int_id)

    async def uninstall(self, request: Any, keep: bool) -> Uninstalled:
        if keep:
            self._host.put(request.lora_int_id, self._copy)
        evicted = set(self._host.take_evicted())
        return Uninstalled(keep and request.lora_int_id in self._host, evicted)


class SimulatedReplica:
    """Answers for adapters that are numbers from 0 on; it knows one from its first request."""

    def __init__(self, sizing: Sizing) -> None:
        self.visits: list[Visit] = []
        self._residency = Residency(SimulatedWorkers(sizing), sizing.slots, LifecycleMetrics())
        self._sizing = sizing
        self._engine = asyncio.Semaphore(sizing.sequences)
        self._generations: dict[int, Generation] = {}

    async def answer(self, adapter: int) -> None:
        """One request from its arrival to its last token."""
        clock = asyncio.get_running_loop().time
        lease = Lease(self._residency, self._generation(adapter), lambda _: None, object())
        arrived = clock()
        tier = await lease.acquire_slot()
        self.visits.append(Visit(tier, clock() - arrived))
        async with self._engine:
            await asyncio.sleep(self._sizing.answer_seconds)
        lease.release()

    def _generation(self, adapter: int) -> Generation:
        if adapter not in self._generations:
            name = f"adapter-{adapter}"
            traffic = AdapterTraffic(name, lambda _: None, asyncio.get_running_loop().time)
            status = GenerationStatus(SOURCE, traffic)
            request = SimulatedRequest(adapter + 1)
            self._generations[adapter] = Generation(name, CONTENT, request, status)
        return self._generations[adapter]
