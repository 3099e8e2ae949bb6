"""What the workers count, summed over workers, engines and generations.

Workers count on their own; a scrape asks them.
"""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.tasks import Tasks
from molehill.engine.routing_stats import RoutingStats, SiteRoutingStats
from molehill.engine.vllm import protocol
from molehill.engine.vllm.protocol import Engine, RoutingReply, StatsReply, StepSeconds

logger = logging.getLogger("vllm.molehill")

# A scrape does not wait longer for busy workers; it then shows the figures of the last one.
PATIENCE_SECONDS = 3.0


@dataclass
class GenerationStats:
    """One generation over an engine's workers. resident_bytes: None if it is in no worker's
    slots."""

    name: str
    stats: RoutingStats = field(default_factory=RoutingStats)
    resident_bytes: int | None = None


@dataclass(frozen=True)
class EngineStats:
    """What the workers of one engine answered, by adapter name. adapters: generations that are in
    their slots."""

    stats: Mapping[str, RoutingStats] = field(default_factory=dict)
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    adapters: int = 0


@dataclass(frozen=True)
class Snapshot:
    """One answer of the workers, by adapter name, summed over engines; engines: the same of each,
    by data-parallel rank. seconds, compilations: summed over workers, None where they are not
    measured.

    age: seconds since the question that they answered; since the start where they never have.
    """

    stats: Mapping[str, RoutingStats] = field(default_factory=dict)
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    engines: Mapping[int, EngineStats] = field(default_factory=dict)
    seconds: StepSeconds | None = None
    compilations: int | None = None
    age: float = 0.0


def by_generation(replies: Iterable[StatsReply]) -> dict[int, GenerationStats]:
    """By `lora_int_id`, of one reply per worker of one engine.

    Tensor-parallel workers see the same tokens at the same sites, pipeline stages at their own:
    every stage counts once. Memory and seconds add up.
    """
    result: dict[int, GenerationStats] = {}
    counted: set[tuple[int, int]] = set()
    for reply in replies:
        for lora_id, report in reply.adapters.items():
            entry = result.setdefault(lora_id, GenerationStats(report.name))
            if report.resident_bytes is not None:
                entry.resident_bytes = (entry.resident_bytes or 0) + report.resident_bytes
            if (lora_id, reply.stage) in counted:
                entry.stats.op_seconds += report.stats.op_seconds
                continue
            counted.add((lora_id, reply.stage))
            tokens = max(entry.stats.tokens, report.stats.tokens)
            entry.stats.add(report.stats)
            entry.stats.tokens = tokens
    return result


def seconds(replies: Collection[StatsReply]) -> StepSeconds | None:
    """Summed over workers; None if one of them does not measure."""
    measured = [reply.seconds for reply in replies if reply.seconds is not None]
    if not measured or len(measured) < len(replies):
        return None
    return StepSeconds(
        sum(worker.steps for worker in measured), sum(worker.ops for worker in measured)
    )


def compilations(replies: Iterable[StatsReply]) -> int | None:
    """Of kernels after the start, over all workers; None if none of them compiles any."""
    counted = [reply.compilations for reply in replies if reply.compilations is not None]
    return sum(counted) if counted else None


def host_bytes(replies: Iterable[StatsReply], generations: Iterable[Generation]) -> dict[str, int]:
    """What waits in the workers' host memory, by adapter name."""
    result: Counter[str] = Counter()
    names = {generation.lora_int_id: generation.name for generation in generations}
    for reply in replies:
        for lora_id, taken in reply.host_bytes.items():
            if lora_id in names:
                result[names[lora_id]] += taken
    return dict(result)


def by_engine(replies: Iterable[StatsReply]) -> dict[int, list[StatsReply]]:
    """By data-parallel rank, in its order."""
    result: dict[int, list[StatsReply]] = {}
    for reply in sorted(replies, key=lambda reply: reply.engine):
        result.setdefault(reply.engine, []).append(reply)
    return result


def summed_stats(engines: Iterable[EngineStats]) -> dict[str, RoutingStats]:
    """Of each name, over engines, which have served different tokens."""
    result: dict[str, RoutingStats] = defaultdict(RoutingStats)
    for engine in engines:
        for name, stats in engine.stats.items():
            result[name].add(stats)
    return dict(result)


def summed(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of each name; a name that has none anywhere stays."""
    result: dict[str, int] = defaultdict(int)
    for engine in sizes:
        for name, size in engine.items():
            result[name] += size
    return dict(result)


def routing_of(replies: Iterable[RoutingReply]) -> tuple[int, dict[str, SiteRoutingStats]]:
    """Tokens and sites of one generation. An engine's workers have seen the same tokens, at the
    same sites or, of other pipeline stages, at their own; engines have seen different ones."""
    tokens: dict[int, int] = {}
    sites: dict[str, dict[int, SiteRoutingStats]] = {}
    for reply in replies:
        tokens[reply.engine] = max(tokens.get(reply.engine, 0), reply.tokens)
        for site, stats in reply.sites.items():
            sites.setdefault(site, {})[reply.engine] = stats
    return sum(tokens.values()), {
        site: SiteRoutingStats.total(list(engines.values())) for site, engines in sites.items()
    }


class StatsByName:
    """Stats of one engine by name, which go on where a generation takes the place of another."""

    def __init__(self) -> None:
        self._ended: dict[str, RoutingStats] = {}

    def update(
        self,
        generations: Mapping[int, GenerationStats],
        known: Collection[int],
        names: Collection[str],
    ) -> dict[str, RoutingStats]:
        """One answer of the workers; none may be given twice.

        known: the generations that the workers were asked about. Others that are in no slot have
        been told for the last time. names: what is served or still runs; the figures of other names
        end.
        """
        self._ended = {name: stats for name, stats in self._ended.items() if name in names}
        active = []
        for lora_id, generation in generations.items():
            if lora_id in known or generation.resident_bytes is not None:
                active.append(generation)
            elif generation.name in names:
                self._ended.setdefault(generation.name, RoutingStats()).add(generation.stats)
        sums = {name: RoutingStats() for name in names}
        for name, stats in self._ended.items():
            sums[name].add(stats)
        for generation in active:
            if generation.name in sums:
                sums[generation.name].add(generation.stats)
        return sums


class WorkerStats:
    """The workers' counters, refreshed when asked for."""

    def __init__(self, engine: Engine, registry: AdapterRegistry) -> None:
        self._engine = engine
        self._registry = registry
        self._totals: dict[int, StatsByName] = defaultdict(StatsByName)
        self._last = Snapshot()
        # When the workers were asked for it, on the monotonic clock.
        self._asked = time.monotonic()
        self._asking: asyncio.Task[None] | None = None
        self._tasks = Tasks("metrics", registry.events)

    async def refresh(self) -> Snapshot:
        """The workers' figures, or the last ones if they take too long or give none; `age` tells.

        The question itself is never cut short: vLLM would take its late answer for the next one's.
        """
        if self._asking is None or self._asking.done():
            self._asking = self._tasks.start(self._ask())
        try:
            await asyncio.wait_for(asyncio.shield(self._asking), PATIENCE_SECONDS)
        except TimeoutError:
            logger.warning("Workers are busy; adapter metrics are those of the last scrape")
            self._registry.events.scrape_failed("late")
        except Exception:
            # A dead engine must not take the metrics with it that show it. The task has logged it.
            self._registry.events.scrape_failed("error")
        return replace(self._last, age=time.monotonic() - self._asked)

    async def routing(self, lora_int_id: int) -> tuple[int, dict[str, SiteRoutingStats]]:
        """One generation's tokens, and its figures by site."""
        asked = protocol.RoutingRequest(lora_int_id)
        return routing_of(await protocol.ROUTING.ask(self._engine, asked))

    async def _ask(self) -> None:
        known = {generation.lora_int_id for generation in self._registry.alive()}
        asked = time.monotonic()
        replies = await protocol.STATS.ask(self._engine, protocol.StatsRequest(tuple(known)))
        engines = {
            rank: self._of_engine(rank, answers, known)
            for rank, answers in by_engine(replies).items()
        }
        self._last = Snapshot(
            summed_stats(engines.values()),
            summed(engine.resident_bytes for engine in engines.values()),
            summed(engine.host_bytes for engine in engines.values()),
            engines,
            seconds(replies),
            compilations(replies),
        )
        self._asked = asked

    def _of_engine(
        self, rank: int, replies: Sequence[StatsReply], known: Collection[int]
    ) -> EngineStats:
        """replies: of the workers of one engine. known: as they were asked."""
        generations = by_generation(replies)
        alive = self._registry.alive()
        names = {generation.name for generation in alive}
        resident = dict.fromkeys(names, 0)
        for generation in generations.values():
            if generation.name in names:
                resident[generation.name] += generation.resident_bytes or 0
        return EngineStats(
            self._totals[rank].update(generations, known, names),
            resident,
            host_bytes(replies, alive),
            sum(generation.resident_bytes is not None for generation in generations.values()),
        )
