"""What clients feel while a trainer pushes versions: one real server, the ratio from one run.

    python benchmarks/trainer_loop.py .models/SmolLM2-135M-Instruct --seconds 600

8 streams ask one name without end. Quiet, then with a new version of 10 MB under that name every 2
seconds, sent as an upload (or loaded by path), then quiet again:

1. p99 inter-token latency while versions come, over that of both quiet spells.
2. Requests that failed, or ended early.
3. Resident memory of all the server's processes while versions come: its slope.

Streams on versions of their own have their own weights to multiply by, which `--ask steady` leaves
out: they then ask an adapter that stays. Run it on a machine that does nothing else. It ends with 1
if a limit is missed; a run of less than a minute of pushes is held to no failure alone.
"""

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from molehill.benchmarks.arguments import server_parser
from molehill.benchmarks.churn import ADAPTER_BYTES, STREAMS, percentile
from molehill.benchmarks.client import Client

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import Server, serve  # type: ignore[import-not-found]

POLICY = "policy"
INTERVAL_SECONDS = 2.0
# Different weights, which come by turns: what was freed is a new version when it comes again.
VERSIONS = 12
STREAM_TOKENS = 64
# What must be reached, and from how many seconds of pushes on. Slope: of the memory, per minute.
LIMITS = {"itl_ratio": 1.25, "failed": 0, "mb_per_minute": 10.0}
LONG_ENOUGH = 60.0
# Of the pushes, before which memory is not looked at: caches fill.
WARM_UP = 0.25


@dataclass(frozen=True)
class MemorySample:
    """mb: resident, of all processes, shared pages counted in each. at: seconds."""

    at: float
    mb: float


class PolicyStreams:
    """Streams without end. gaps: (when the second token came, seconds). outcomes: why requests
    failed, empty for those that did not."""

    def __init__(self, client: Client, model: str) -> None:
        self.gaps: list[tuple[float, float]] = []
        self.outcomes = Counter[str]()
        self._client = client
        self._model = model

    async def run(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(STREAMS)))

    async def _one(self) -> None:
        while True:
            self.outcomes[await self._ask()] += 1

    async def _ask(self) -> str:
        before, tokens = 0.0, 0
        try:
            async for now, text in self._client.chunks(self._model, STREAM_TOKENS):
                if before:
                    self.gaps.append((now, now - before))
                before = now
                tokens += sum(len(one["token_ids"] or ()) for one in json.loads(text)["choices"])
        except (httpx.HTTPError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if tokens == STREAM_TOKENS else f"{tokens} tokens of {STREAM_TOKENS}"

    def between(self, start: float, end: float) -> list[float]:
        """Gaps that lie wholly within."""
        return [gap for at, gap in self.gaps if at <= end and at - gap >= start]


class Trainer:
    """Pushes versions. seconds: from asking for each to its answer."""

    def __init__(self, client: Client, versions: Sequence[Path], by: str) -> None:
        self.seconds: list[float] = []
        self._client = client
        self._by = by
        self._versions = itertools.cycle(versions)
        self._bytes = {version: read(version) for version in versions}

    async def push(self) -> None:
        version = next(self._versions)
        start = time.perf_counter()
        if self._by == "path":
            await self._client.load(POLICY, version)
        else:
            await self._client.upload(POLICY, self._bytes[version])
        self.seconds.append(time.perf_counter() - start)
        print(f"pushed in {self.seconds[-1]:.2f} s", file=sys.stderr)

    async def run(self, end: float) -> None:
        """One every INTERVAL_SECONDS, later where one takes longer."""
        due = time.perf_counter()
        while due < end:
            await self.push()
            due = max(due + INTERVAL_SECONDS, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


async def watch(group: int, samples: list[MemorySample]) -> None:
    """Memory once a second, until it is cancelled."""
    while True:
        samples.append(MemorySample(time.perf_counter(), await asyncio.to_thread(resident, group)))
        await asyncio.sleep(1.0)


def resident(group: int) -> float:
    """MB of all processes of a group."""
    total = 0
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group:
                total += psutil.Process(pid).memory_info().rss
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return total / 1e6


def slope(samples: Sequence[MemorySample]) -> float:
    """MB per minute, by least squares."""
    if len(samples) < 2:
        return 0.0
    line = statistics.linear_regression([s.at for s in samples], [s.mb for s in samples])
    return 60 * line.slope


async def measure(
    server: Server, versions: Sequence[Path], by: str, ask: str, seconds: float, quiet: float
) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as http:
        client = Client(http, "base")
        await client.load(client.steady, versions[-1], pinned=True)
        trainer = Trainer(client, versions[:-1], by)
        await trainer.push()
        trainer.seconds.clear()
        streams = PolicyStreams(client, POLICY if ask == POLICY else client.steady)
        samples: list[MemorySample] = []
        tasks = [
            asyncio.create_task(streams.run()),
            asyncio.create_task(watch(server.process.pid, samples)),
        ]
        try:
            await asyncio.sleep(min(5.0, quiet))
            print(f"quiet for {quiet:g} s", file=sys.stderr)
            spells = [time.perf_counter()]
            await asyncio.sleep(quiet)
            spells.append(time.perf_counter())
            await trainer.run(spells[1] + seconds)
            spells.append(time.perf_counter())
            await asyncio.sleep(quiet)
            spells.append(time.perf_counter())
        finally:
            for task in tasks:
                task.cancel()
            endings = await asyncio.gather(*tasks, return_exceptions=True)
        for ended in endings:
            if not isinstance(ended, asyncio.CancelledError):
                raise RuntimeError("the streams or the watch on memory broke off") from ended
    pushing = [s for s in samples if spells[1] <= s.at <= spells[2]]
    return summary(streams, trainer, spells, pushing[round(WARM_UP * len(pushing)) :])


def summary(
    streams: PolicyStreams,
    trainer: Trainer,
    spells: Sequence[float],
    pushing: Sequence[MemorySample],
) -> dict[str, Any]:
    """spells: when the first quiet one began, it ended, pushes ended, the second quiet ended."""
    before, during, after = (streams.between(*spells[i : i + 2]) for i in range(3))
    quiet = [*before, *after]
    failed = {why: count for why, count in streams.outcomes.items() if why}
    return {
        "itl_ratio": percentile(during, 99) / percentile(quiet, 99),
        "p99": {"quiet": percentile(quiet, 99), "pushing": percentile(during, 99)},
        "p50": {"quiet": percentile(quiet, 50), "pushing": percentile(during, 50)},
        "longest": {"quiet": max(quiet), "pushing": max(during)},
        "tokens": {"quiet": len(quiet), "pushing": len(during)},
        "quiet_p99s": [percentile(before, 99), percentile(after, 99)],
        "requests": streams.outcomes.total(),
        "failed": sum(failed.values()),
        "why": failed,
        "pushes": len(trainer.seconds),
        "push_seconds": {
            "median": statistics.median(trainer.seconds),
            "longest": max(trainer.seconds),
        },
        "mb_per_minute": slope(pushing),
        "mb": [pushing[0].mb, pushing[-1].mb] if pushing else [],
        "memory": [asdict(sample) for sample in pushing],
    }


def save_versions(model: Path, root: Path, kind: str) -> list[Path]:
    """VERSIONS of about ADAPTER_BYTES, and one that stays; no two are alike."""
    from molehill.benchmarks import synthetic
    from molehill.engine.hf.shapes import base_model

    base = base_model(model)
    folders = [root / f"version-{seed}" for seed in range(VERSIONS + 1)]
    if kind == "lora":
        # As PEFT saves it, in bfloat16: half of the float32 in `num_bytes`.
        rank = round(2 * ADAPTER_BYTES / synthetic.lora(base, 1, 0).num_bytes)
        return [synthetic.save_lora(base, rank, one, seed) for seed, one in enumerate(folders)]
    return synthetic.save_dynmoles(base, ADAPTER_BYTES, folders)


def missed(results: dict[str, Any], *, long_enough: bool) -> list[str]:
    names = list(LIMITS) if long_enough else ["failed"]
    return [name for name in names if results[name] > LIMITS[name]]


def report(results: dict[str, Any]) -> list[str]:
    """Each figure beside what it must reach."""
    p99, mb = results["p99"], results["mb"]
    return [
        f"p99 inter-token latency of {STREAMS} streams, pushing / quiet: "
        f"{results['itl_ratio']:.3f} (at most {LIMITS['itl_ratio']}); "
        f"{1e3 * p99['pushing']:.0f} / {1e3 * p99['quiet']:.0f} ms, "
        f"{results['tokens']['pushing']} and {results['tokens']['quiet']} gaps; quiet before and "
        f"after {' and '.join(f'{1e3 * p:.0f}' for p in results['quiet_p99s'])} ms",
        f"failed requests: {results['failed']} of {results['requests']} (at most "
        f"{LIMITS['failed']}) {results['why'] or ''}",
        f"memory of all processes: {results['mb_per_minute']:+.1f} MB/minute (at most "
        f"{LIMITS['mb_per_minute']}), from {mb[0]:.0f} to {mb[-1]:.0f} MB",
        f"pushes: {results['pushes']} of {results['adapter_bytes'] / 1e6:.1f} MB, median "
        f"{results['push_seconds']['median']:.2f} s, longest "
        f"{results['push_seconds']['longest']:.2f} s",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    from molehill.benchmarks.host import host

    parser = server_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of pushes")
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds before and after them")
    parser.add_argument("--by", choices=("upload", "path"), default="upload")
    parser.add_argument("--ask", choices=(POLICY, "steady"), default=POLICY)
    parser.add_argument("--kind", choices=("dynmole", "lora"), default="dynmole")
    parser.add_argument("--json", type=Path, help="where to write all figures (default: nowhere)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        versions = save_versions(args.model, folder / "root", args.kind)
        options = [
            *("--max-model-len", "512", "--served-model-name", "base"),
            *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
            *(["--enforce-eager"] if args.eager else []),
        ]
        with serve(args.model, folder / "log", options, warm=args.warm) as server:
            measuring = measure(server, versions, args.by, args.ask, args.seconds, args.quiet)
            results = asyncio.run(measuring)
        results["adapter_bytes"] = sum(path.stat().st_size for path in versions[0].iterdir())
    results |= {
        "machine": host(),
        "model": args.model.name,
        "options": {name: str(value) for name, value in vars(args).items()},
        "limits": LIMITS,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(report(results)))
    late = missed(results, long_enough=args.seconds >= LONG_ENOUGH)
    if late:
        print(f"missed: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
