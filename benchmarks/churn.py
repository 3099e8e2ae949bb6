"""What clients feel while adapters come and go: one real server, every ratio from one run.

    python benchmarks/churn.py .models/SmolLM2-135M-Instruct

1. p99 inter-token latency of 8 streams while an adapter of 10 MB is loaded and unloaded without a
   pause, over that of quiet spells in between.
2. From the request to load that adapter to the first token that it gives.
3. Tokens per second of one adapter with 1,000 registered ones, over that with itself alone.
4. Requests that failed, of many, while adapters are loaded, replaced and unloaded. Greedy tokens
   that are not those of before the churn are a failure too.

Run it on a machine that does nothing else: repetitions stand beside every median. It ends with 1 if
a limit is missed; a quick run's figures are none, so that only failures count there.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from molehill.benchmarks.client import Client

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import Server, serve  # type: ignore[import-not-found]

STREAMS, CLIENTS = 8, 16
STREAM_TOKENS, REQUEST_TOKENS = 400, 8
ADAPTER_BYTES = 10_000_000
# Prompts per model whose answers are known.
KNOWN = 32
# What must be reached: the most for a ratio, seconds and failures, the least for throughput.
LIMITS = {"itl_ratio": 1.25, "first_token_seconds": 1.0, "throughput_ratio": 0.98, "failed": 0}


@dataclass(frozen=True)
class Sizes:
    """repetitions: of each pair of periods. seconds: of one period. registered: adapters in all."""

    repetitions: int = 10
    seconds: float = 15.0
    registered: int = 1000
    requests: int = 10_000


QUICK = Sizes(repetitions=1, seconds=2.0, registered=20, requests=60)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


# Inter-token latency


@dataclass(frozen=True)
class Period:
    """p50, p99, longest: seconds between two tokens of a stream. loads: that it saw end."""

    p50: float
    p99: float
    longest: float
    tokens: int
    loads: int


class SteadyStreams:
    """Streams without end on the steady adapter. gaps: (when the second token came, seconds)."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.gaps: list[tuple[float, float]] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(STREAMS)))

    async def _one(self) -> None:
        while True:
            before = 0.0
            async for now in self._client.stream(self._client.steady, STREAM_TOKENS):
                if before:
                    self.gaps.append((now, now - before))
                before = now

    def between(self, start: float, end: float) -> list[float]:
        """Gaps that lie wholly within."""
        return [gap for at, gap in self.gaps if at <= end and at - gap >= start]


async def churn(
    client: Client, sources: Sequence[Path], stop: asyncio.Event, loads: list[float]
) -> None:
    """Loads and unloads without a pause, other weights each time."""
    for source in itertools.cycle(sources):
        if stop.is_set():
            return
        start = time.perf_counter()
        await client.load("churned", source)
        loads.append(time.perf_counter() - start)
        await client.unload("churned")


async def period(
    client: Client, streams: SteadyStreams, seconds: float, sources: Sequence[Path]
) -> Period:
    """One stretch of time with churn of `sources`, or without any."""
    loads: list[float] = []
    stop = asyncio.Event()
    start = time.perf_counter()
    task = asyncio.create_task(churn(client, sources, stop, loads))
    await asyncio.sleep(seconds)
    gaps = streams.between(start, time.perf_counter())
    stop.set()
    await task
    return Period(percentile(gaps, 50), percentile(gaps, 99), max(gaps), len(gaps), len(loads))


async def latencies(client: Client, sizes: Sizes, sources: Sequence[Path]) -> list[dict[str, Any]]:
    """A quiet period and one of churn by repetition, by turns also in which comes first."""
    streams = SteadyStreams(client)
    results = []
    task = asyncio.create_task(streams.run())
    await asyncio.sleep(min(3.0, sizes.seconds))
    for repetition in range(sizes.repetitions):
        order = ("quiet", "churn") if repetition % 2 else ("churn", "quiet")
        spells = {
            arm: await period(client, streams, sizes.seconds, sources if arm == "churn" else ())
            for arm in order
        }
        if task.done():
            task.result()
        ratio = spells["churn"].p99 / spells["quiet"].p99
        results.append({"ratio": ratio, **{arm: asdict(result) for arm, result in spells.items()}})
        print(f"inter-token latency {repetition}: ratio {ratio:.3f}", file=sys.stderr)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return results


# Load to first token, registered adapters, failures


async def first_token(client: Client, source: Path) -> float:
    """Seconds from asking for the load to its first token; nothing else goes on."""
    start = time.perf_counter()
    await client.load("fresh", source)
    async with aclosing(client.stream("fresh", 2)) as streamed:
        seconds = await anext(streamed) - start
    await client.unload("fresh")
    return seconds


async def throughput(client: Client, seconds: float) -> float:
    """Tokens per second of a full batch on the steady adapter."""
    end = time.perf_counter() + seconds
    tokens = 0

    async def ask() -> None:
        nonlocal tokens
        while time.perf_counter() < end:
            failure = await client.complete(client.steady, 64)
            if failure:
                raise RuntimeError(failure)
            tokens += 64

    start = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return tokens / (time.perf_counter() - start)


async def among_many(client: Client, sizes: Sizes, small: Sequence[Path]) -> list[dict[str, float]]:
    """Alone, among all, alone: the ratio is to the mean of both neighbours."""
    results = []
    await throughput(client, sizes.seconds)
    for repetition in range(max(1, sizes.repetitions // 3)):
        before = await throughput(client, sizes.seconds)
        for i, source in enumerate(small):
            await client.load(f"small-{i}", source, allow_noop=True)
        registered = len((await client.http.get("/v1/adapters")).json()["data"])
        among = await throughput(client, sizes.seconds)
        for i in range(len(small)):
            await client.unload(f"small-{i}")
        after = await throughput(client, sizes.seconds)
        ratio = 2 * among / (before + after)
        row = {"registered": registered, "before": before, "among": among, "after": after}
        results.append({"ratio": ratio, **row})
        print(f"throughput {repetition}: ratio {ratio:.4f}", file=sys.stderr)
    return results


async def replace(client: Client, sources: Sequence[Path], stop: asyncio.Event) -> Counter[str]:
    """Replaces one name, and loads, asks and unloads another, until told to stop.

    Returns what came of the requests to the other one: asked before it goes, they finish after.
    """
    outcomes = Counter[str]()
    for source in itertools.cycle(sources):
        if stop.is_set():
            return outcomes
        await client.load("replaced", source)
        await client.load("churned", source)
        streamed = client.stream("churned", REQUEST_TOKENS)
        await anext(streamed)
        await client.unload("churned")
        rest = [now async for now in streamed]
        outcomes["" if rest else "a stream that ended early"] += 1
    return outcomes


async def failures(client: Client, sizes: Sizes, sources: Sequence[Path]) -> dict[str, Any]:
    """Requests to the base, an adapter that stays and one that is replaced all the time."""
    known = {
        model: [await client.learn(model, REQUEST_TOKENS) for _ in range(KNOWN)]
        for model in (client.base, client.steady)
    }
    for model, answers in known.items():
        if not any(one.tokens for one in answers):
            raise RuntimeError(f"{model}: found no answer that is sure enough to be compared")
    await client.load("replaced", sources[-1])
    left, outcomes = iter(range(sizes.requests)), Counter[str]()
    compared = 0

    async def ask() -> None:
        nonlocal compared
        for number in left:
            model = (client.base, client.steady, "replaced")[number % 3]
            expected = known[model][number // 3 % KNOWN] if model in known else None
            outcomes[await client.complete(model, REQUEST_TOKENS, expected)] += 1
            compared += len(expected.tokens) if expected else 0

    stop = asyncio.Event()
    start = time.perf_counter()
    task = asyncio.create_task(replace(client, sources, stop))
    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    seconds = time.perf_counter() - start
    stop.set()
    churned = await task
    await client.unload("replaced")
    failed = {text: count for text, count in (outcomes + churned).items() if text}
    return {
        "requests": (outcomes + churned).total(),
        "failed": sum(failed.values()),
        "why": failed,
        "tokens_compared": compared,
        "rounds": churned.total(),
        "seconds": seconds,
    }


# Adapters, server, report


def save_adapters(model: Path, root: Path, small: int) -> tuple[list[Path], list[Path]]:
    """Three of about 10 MB, and `small` tiny ones; no two are alike."""
    from molehill.benchmarks import synthetic
    from molehill.engine.hf.shapes import base_model

    base = base_model(model)
    folders = [root / f"large-{seed}" for seed in range(3)]
    large = synthetic.save_dynmoles(base, ADAPTER_BYTES, folders)
    return large, synthetic.save_tiny(base, root, small)


async def measure(server: Server, sizes: Sizes, large: list[Path], small: list[Path]) -> Any:
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        client = Client(http, "base")
        steady, *others = large
        await client.load(client.steady, steady, pinned=True)
        firsts = [
            await first_token(client, others[i % 2]) for i in range(1 + 2 * sizes.repetitions)
        ]
        return {
            "first_token_seconds": firsts[1:],
            "itl": await latencies(client, sizes, others),
            "requests": await failures(client, sizes, others),
            "throughput": await among_many(client, sizes, small),
        }


def missed(results: Any, *, quick: bool) -> list[str]:
    """The limits that the medians do not keep; of a quick run, whether a request failed."""
    speed = {
        "itl_ratio": statistics.median(row["ratio"] for row in results["itl"]),
        "first_token_seconds": statistics.median(results["first_token_seconds"]),
        "throughput_ratio": statistics.median(row["ratio"] for row in results["throughput"]),
    }
    reached = {**({} if quick else speed), "failed": results["requests"]["failed"]}
    return [
        name
        for name, value in reached.items()
        if (value < LIMITS[name] if name == "throughput_ratio" else value > LIMITS[name])
    ]


def report(results: Any) -> list[str]:
    """Each figure beside what it must reach."""
    itl = [row["ratio"] for row in results["itl"]]
    firsts = results["first_token_seconds"]
    speed = [row["ratio"] for row in results["throughput"]]
    asked = results["requests"]
    registered = results["throughput"][0]["registered"]
    return [
        f"p99 inter-token latency of {STREAMS} streams, churn / quiet: median "
        f"{statistics.median(itl):.3f}, best {min(itl):.3f}, worst {max(itl):.3f} of {len(itl)} "
        f"(at most {LIMITS['itl_ratio']})",
        f"load of {results['adapter_bytes'] / 1e6:.1f} MB to first token: median "
        f"{statistics.median(firsts):.3f} s, best {min(firsts):.3f}, worst {max(firsts):.3f} of "
        f"{len(firsts)} (under {LIMITS['first_token_seconds']} s)",
        f"throughput with {registered} registered / 1: median {statistics.median(speed):.4f}, "
        f"best {max(speed):.4f}, worst {min(speed):.4f} of {len(speed)} "
        f"(at least {LIMITS['throughput_ratio']})",
        f"failed requests: {asked['failed']} of {asked['requests']} in {asked['rounds']} rounds of "
        f"churn (at most {LIMITS['failed']}) {asked['why'] or ''}, "
        f"{asked['tokens_compared']} tokens compared",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    from molehill.benchmarks.host import host

    default = Sizes()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke test: its figures are none")
    parser.add_argument("--repetitions", type=int, default=default.repetitions)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--registered", type=int, default=default.registered)
    parser.add_argument("--requests", type=int, default=default.requests)
    results = Path(__file__).parent / "results"
    parser.add_argument("--json", type=Path, help="default: results/churn.json, none with --quick")
    args = parser.parse_args(arguments)
    sizes = (
        QUICK
        if args.quick
        else Sizes(args.repetitions, args.seconds, args.registered, args.requests)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large, small = save_adapters(args.model, folder / "root", sizes.registered - 1)
        options = [
            *("--max-model-len", "512", "--no-enable-prefix-caching"),
            *("--served-model-name", "base", "--adapter-root", str(folder / "root")),
            *("--max-adapters", str(sizes.registered + 10)),
            *(["--enforce-eager"] if args.quick else []),
        ]
        with serve(args.model, folder / "log", options) as server:
            measured = asyncio.run(measure(server, sizes, large, small))
        measured["adapter_bytes"] = sum(path.stat().st_size for path in large[0].iterdir())
    measured |= {
        "machine": host(),
        "model": args.model.name,
        "sizes": asdict(sizes),
        "limits": LIMITS,
    }
    path = args.json or (None if args.quick else results / "churn.json")
    if path is not None:
        path.write_text(json.dumps(measured, indent=1) + "\n")
    print("\n".join(report(measured)))
    late = missed(measured, quick=args.quick)
    if late:
        print(f"missed: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
