"""What one tenant feels of another's flood, with and without limits: one real server, one run.

    python benchmarks/tenants.py .models/SmolLM2-135M-Instruct

The quiet tenant asks its two adapters by turns, one request after the other. The other has twelve
adapters and eight clients that ask them without a pause, but for a refusal's `Retry-After`. Spells
take turns: quiet alone, beside the flood as it comes, alone again, beside the flood held to LIMITS.

1. p99 of the quiet tenant's time to first token, flood / alone.
2. p99 of its inter-token latency, flood / alone.

Run it on a machine that does nothing else. It ends with 1 if a ratio under limits is above MOST, or
a request of the quiet tenant failed.
"""

import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from molehill.benchmarks.arguments import server_parser
from molehill.benchmarks.client import Client
from molehill.benchmarks.workloads import percentile

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import Server, serve  # type: ignore[import-not-found]

QUIET, FLOOD, CLIENTS = 2, 12, 8
SLOTS = 4
QUIET_TOKENS, FLOOD_TOKENS = 16, 32
ADAPTER_BYTES = 10_000_000
# Of each adapter of the flood.
LIMITS = {"requests_in_flight": 1, "tokens_per_second": 20, "tenant": "flood", "tenant_slots": 1}
MOST = 1.5
ARMS = ("without limits", "with limits")


@dataclass
class Spell:
    """Seconds of the quiet tenant's requests, and what came of the flood's, by status."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    flood: Counter[int] = field(default_factory=Counter)

    def p99s(self) -> dict[str, float]:
        return {"first": percentile(self.first, 99), "gaps": percentile(self.gaps, 99)}


async def ask_quietly(client: Client, names: Iterator[str], end: float, spell: Spell) -> None:
    while time.perf_counter() < end:
        before = start = time.perf_counter()
        first = True
        async for now in client.stream(next(names), QUIET_TOKENS):
            (spell.first if first else spell.gaps).append(now - before)
            before, first = now, False
        if before == start:
            raise RuntimeError("found no token of a request of the quiet tenant")


async def flood(client: Client, names: Iterator[str], end: float, spell: Spell) -> None:
    while time.perf_counter() < end:
        body = client.body(next(names), FLOOD_TOKENS)
        answer = await client.http.post("/v1/completions", json=body)
        spell.flood[answer.status_code] += 1
        if answer.status_code == 429:
            await asyncio.sleep(
                min(float(answer.headers["Retry-After"]), end - time.perf_counter())
            )
        else:
            answer.raise_for_status()


async def spell_of(client: Client, seconds: float, names: Sequence[str], flooding: bool) -> Spell:
    spell, end = Spell(), time.perf_counter() + seconds
    quiet, others = itertools.cycle(names[:QUIET]), itertools.cycle(names[QUIET:])
    floods = (flood(client, others, end, spell) for _ in range(CLIENTS * flooding))
    await asyncio.gather(ask_quietly(client, quiet, end, spell), *floods)
    return spell


async def hold(client: Client, root: Path, names: Sequence[str], limits: Any) -> None:
    """The flood's adapters to limits; the same content again changes nothing else."""
    for name in names[QUIET:]:
        await client.load(name, root / name, limits=limits)


async def measure(server: Server, root: Path, repetitions: int, seconds: float) -> Any:
    names = sorted(folder.name for folder in root.iterdir())
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as http:
        client = Client(http, "base")
        for name in names:
            await client.load(name, root / name)
        await spell_of(client, min(5.0, seconds), names, flooding=False)
        for repetition in range(repetitions):
            for arm, limits in zip(ARMS, (None, LIMITS), strict=True):
                await hold(client, root, names, limits)
                alone = await spell_of(client, seconds, names, flooding=False)
                beside = await spell_of(client, seconds, names, flooding=True)
                results[arm].append(compared(alone, beside))
                print(f"{repetition} {arm}: {results[arm][-1]}", file=sys.stderr)
    return results


def compared(alone: Spell, beside: Spell) -> dict[str, Any]:
    before, during = alone.p99s(), beside.p99s()
    return {
        "ratios": {what: during[what] / before[what] for what in before},
        "alone": before,
        "beside": during,
        "requests": [len(alone.first), len(beside.first)],
        "flood": dict(beside.flood),
    }


def ratio(rows: Sequence[Any], what: str) -> float:
    return float(statistics.median(row["ratios"][what] for row in rows))


def missed(results: Any) -> list[str]:
    """What is above MOST under limits."""
    return [what for what in ("first", "gaps") if ratio(results["with limits"], what) > MOST]


def report(results: Any) -> list[str]:
    lines = []
    for arm in ARMS:
        rows = results[arm]
        for what, words in (("first", "time to first token"), ("gaps", "inter-token latency")):
            alone, beside = (
                statistics.median(row[spell][what] for row in rows) for spell in ("alone", "beside")
            )
            bound = f" (at most {MOST})" if arm == "with limits" else ""
            lines.append(
                f"{arm}: p99 {words} beside the flood / alone: {ratio(rows, what):.2f}{bound}, "
                f"{1e3 * beside:.0f} / {1e3 * alone:.0f} ms, median of {len(rows)}"
            )
        served = sum(row["flood"].get(200, 0) for row in rows)
        refused = sum(row["flood"].get(429, 0) for row in rows)
        lines.append(f"{arm}: of the flood {served} served, {refused} refused")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    from molehill.benchmarks import synthetic
    from molehill.benchmarks.host import host
    from molehill.engine.hf.shapes import base_model

    parser = server_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a spell")
    parser.add_argument("--json", type=Path, help="where to write all figures (default: nowhere)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        names = [f"a-quiet-{n}" for n in range(QUIET)] + [f"b-flood-{n:02}" for n in range(FLOOD)]
        folders = [root / name for name in names]
        synthetic.save_dynmoles(base_model(args.model), ADAPTER_BYTES, folders)
        options = [
            *("--max-model-len", "512", "--served-model-name", "base"),
            *("--adapter-root", str(root), "--max-loras", str(SLOTS)),
            *("--no-enable-prefix-caching", "--max-adapters", str(len(names))),
            *(["--enforce-eager"] if args.eager else []),
        ]
        with serve(args.model, Path(scratch) / "log", options, warm=args.warm) as server:
            results = asyncio.run(measure(server, root, args.repetitions, args.seconds))
    if args.json is not None:
        everything = {"machine": host(), "model": args.model.name, "limits": LIMITS, **results}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    print(host())
    print("\n".join(report(results)))
    late = missed(results)
    if late:
        print(f"missed: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
