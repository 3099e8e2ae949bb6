"""How many replicas and slots a fleet of many adapters needs, with molehill's own residency.

    python benchmarks/fleet_simulation.py --read-ms 140 --install-ms 40

Requests come at random times to adapters of Zipf's popularity. Each replica is the code that serves
(queue, turns, eviction, host memory) on a clock that skips the waiting; workers, engine and router
are no more than the seconds that they take. Measure those first: `benchmarks/cold_starts.py` prints
the two that decide. Tables: `slots` of one replica, by skew; `reads`, by requests per second of one
replica; `routing` over several, each request to any replica, to that of its adapter (its hash), or
so but for the most popular adapters, which any replica serves.
"""

import argparse
import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from molehill.benchmarks.simulated_replica import SimulatedReplica, Sizing, Visit
from molehill.benchmarks.simulated_time import simulate
from molehill.benchmarks.workloads import percentile

SLOTS = (16, 32, 64, 128, 256, 512)
RATE_STEPS = (0.5, 1.0, 1.5, 2.0, 3.0)
# Of the visits, those that find the slots and host memory still filling.
WARM_UP = 0.5


@dataclass(frozen=True)
class FleetTraffic:
    """adapters: how many. skew: Zipf's exponent; the adapter of rank r, from 1, has 1 / r ** skew
    of the first one's requests. rate: requests per second and replica. requests: in all, of each
    replica. hot: how many of the most popular any replica serves, where requests go by adapter;
    None where any replica serves all."""

    adapters: int
    skew: float
    rate: float
    requests: int
    replicas: int = 1
    hot: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class FleetRow:
    """What was seen after the warm-up. shares: of requests, by the tier where they found their
    adapter. cold: seconds of those that did not find it in a slot, all: of all. busiest: requests
    of the busiest replica over the mean."""

    shares: dict[str, float]
    cold: list[float]
    all: list[float]
    busiest: float

    def cells(self) -> list[str]:
        shares = [f"{100 * self.shares[tier]:.1f} %" for tier in ("worker", "host", "disk")]
        cold = [seconds(self.cold, percent) for percent in (50, 99)]
        return [*shares, *cold, seconds(self.all, 99), f"{self.busiest:.2f}"]


COLUMNS = (
    *("in a slot", "in host memory", "on disk"),
    *("cold start, median", "cold start, p99", "all requests, p99", "busiest replica / mean"),
)


def seconds(values: Sequence[float], percent: int) -> str:
    return f"{percentile(values, percent):.2f} s" if values else "-"


def drawn(traffic: FleetTraffic, generator: random.Random) -> Iterator[int]:
    """Adapters as they are asked for, by rank from 0 on, without end."""
    weights = [1 / rank**traffic.skew for rank in range(1, traffic.adapters + 1)]
    cumulative = list(itertools.accumulate(weights))
    ranks = range(traffic.adapters)
    while True:
        yield from generator.choices(ranks, cum_weights=cumulative, k=1000)


def router(traffic: FleetTraffic, generator: random.Random) -> Callable[[int], int]:
    """Says which replica gets a request for an adapter."""

    def any_replica(adapter: int) -> int:
        return generator.randrange(traffic.replicas)

    def by_adapter(adapter: int) -> int:
        # Ranks are no hashes: neighbours would be dealt out in turn, more evenly than names are.
        return random.Random(adapter).randrange(traffic.replicas)

    hot = traffic.hot
    if hot is None:
        return any_replica
    return lambda adapter: any_replica(adapter) if adapter < hot else by_adapter(adapter)


async def serve(traffic: FleetTraffic, sizing: Sizing) -> FleetRow:
    """All requests of one fleet, from the first arrival to the last answer."""
    generator = random.Random(traffic.seed)
    replicas = [SimulatedReplica(sizing) for _ in range(traffic.replicas)]
    choose = router(traffic, generator)
    number = traffic.requests * traffic.replicas
    running: set[asyncio.Task[None]] = set()
    sent = Counter[int]()
    for adapter in itertools.islice(drawn(traffic, generator), number):
        await asyncio.sleep(generator.expovariate(traffic.rate * traffic.replicas))
        chosen = choose(adapter)
        sent[chosen] += 1
        task = asyncio.create_task(replicas[chosen].answer(adapter))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return row([replica.visits for replica in replicas])


def row(visits: Sequence[Sequence[Visit]]) -> FleetRow:
    """visits: of each replica, in their order."""
    measured = [visit for one in visits for visit in one[round(WARM_UP * len(one)) :]]
    tiers = Counter(visit.tier for visit in measured)
    shares = {tier: tiers[tier] / len(measured) for tier in ("worker", "host", "disk")}
    cold = [visit.seconds for visit in measured if visit.tier != "worker"]
    sizes = [len(one) for one in visits]
    busiest = max(sizes) / mean(sizes)
    return FleetRow(shares, cold, [visit.seconds for visit in measured], busiest)


def table(
    heads: Sequence[str], rows: Iterator[tuple[list[str], FleetTraffic, Sizing]]
) -> Iterator[str]:
    """Lines of Markdown, each as soon as it has been simulated."""
    columns = [*heads, *COLUMNS]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for cells, traffic, sizing in rows:
        yield f"| {' | '.join([*cells, *simulate(serve(traffic, sizing)).cells()])} |"


def by_slots(
    traffic: FleetTraffic, sizing: Sizing, skews: Sequence[float]
) -> Iterator[tuple[list[str], FleetTraffic, Sizing]]:
    for skew, slots in itertools.product(skews, SLOTS):
        cells = [f"{skew:g}", str(slots)]
        yield cells, replace(traffic, skew=skew), replace(sizing, slots=slots)


def by_rate(
    traffic: FleetTraffic, sizing: Sizing
) -> Iterator[tuple[list[str], FleetTraffic, Sizing]]:
    for step, copies in itertools.product(RATE_STEPS, (0, sizing.host_copies)):
        rate = step * traffic.rate
        cells = [f"{rate:g}", str(copies)]
        yield cells, replace(traffic, rate=rate), replace(sizing, host_copies=copies)


def by_routing(
    traffic: FleetTraffic, sizing: Sizing, fleets: Sequence[int], hot: int
) -> Iterator[tuple[list[str], FleetTraffic, Sizing]]:
    ways = {"any": None, "its adapter's": 0, f"its adapter's, but of the first {hot} any": hot}
    for replicas in fleets:
        for way, kept in ways.items():
            if replicas > 1 or kept is None:
                yield [str(replicas), way], replace(traffic, replicas=replicas, hot=kept), sizing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=("slots", "reads", "routing"), action="append")
    parser.add_argument("--read-ms", type=float, required=True, help="see Sizing")
    parser.add_argument("--install-ms", type=float, required=True, help="see Sizing")
    parser.add_argument("--answer-seconds", type=float, default=2.0)
    parser.add_argument("--sequences", type=int, default=64, help="that an engine runs at a time")
    parser.add_argument("--slots", type=int, default=64, help="where the table is not of them")
    parser.add_argument("--host-copies", type=int, default=1000, help="adapters in host memory")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument(
        "--skew", type=float, default=[1.0], nargs="+", help="of the table of slots"
    )
    parser.add_argument("--replicas", type=int, default=[1, 2, 4, 8], nargs="+")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second and replica")
    parser.add_argument("--requests", type=int, default=20_000, help="of each replica")
    parser.add_argument("--hot", type=int, default=32, help="adapters that any replica serves")
    args = parser.parse_args(arguments)
    traffic = FleetTraffic(args.adapters, args.skew[0], args.rate, args.requests)
    sizing = Sizing(
        args.slots,
        args.host_copies,
        args.read_ms / 1e3,
        args.install_ms / 1e3,
        args.answer_seconds,
        args.sequences,
    )
    tables = {
        "slots": (("skew", "slots"), by_slots(traffic, sizing, args.skew)),
        "reads": (("requests/s", "host copies"), by_rate(traffic, sizing)),
        "routing": (
            ("replicas", "served by"),
            by_routing(traffic, sizing, args.replicas, args.hot),
        ),
    }
    for name in args.table or tables:
        heads, rows = tables[name]
        print(f"\n{name}: {traffic}, {sizing}", flush=True)
        for line in table(heads, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
