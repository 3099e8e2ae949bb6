"""Requests per second with 1, 2 and 4 API processes (`--api-server-count`): servers by turns.

    python benchmarks/api_servers.py tests/data/golden/tiny-llama --eager

A model that computes hardly anything, so that answering HTTP is most of the work. All servers run
at once and are asked by turns, so that each meets the same noise: CLIENTS connections, each with a
new request as soon as its last is answered, to the base in one turn and to an adapter in the next.
The client computes on the same machine, and what it takes of it is shown: on a few cores it and the
engine take what further processes would. Run it on a machine that does nothing else.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from molehill.benchmarks import synthetic
from molehill.benchmarks.arguments import server_parser
from molehill.engine.hf.shapes import base_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import Server, serve  # type: ignore[import-not-found]

COUNTS = (1, 2, 4)
CLIENTS, PROMPT, TOKENS = 32, 16, 1
# By what a request asks.
ARMS = {"base": "base", "adapter": "small-0"}


async def ask(session: aiohttp.ClientSession, model: str, end: float) -> int:
    """Requests that were answered until then."""
    prompt = list(range(5, 5 + PROMPT))
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answered = 0
    while time.perf_counter() < end:
        async with session.post("/v1/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise RuntimeError(f"found {answer.status}: {text[:200]}")
            answered += 1
    return answered


async def turn(server: Server, model: str, seconds: float) -> tuple[float, float]:
    """Requests per second, and cores that the client took."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        start, computed = time.perf_counter(), time.process_time()
        asked = (ask(session, model, start + seconds) for _ in range(CLIENTS))
        answered = sum(await asyncio.gather(*asked))
        taken = time.perf_counter() - start
    return answered / taken, (time.process_time() - computed) / taken


def measure(
    servers: Mapping[int, Server], repetitions: int, seconds: float
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """By arm and count, after a turn of each that warms up."""
    results: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repetition in range(-1, repetitions):
        for arm, model in ARMS.items():
            for count, server in servers.items():
                speed, cores = asyncio.run(turn(server, model, seconds))
                if repetition >= 0:
                    results.setdefault((arm, count), []).append((speed, cores))
                    print(f"{repetition} {arm} {count}: {speed:.0f}/s", file=sys.stderr)
    return results


def summary(results: Mapping[tuple[str, int], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A ratio is to one process in the same repetition."""
    lines = []
    for (arm, count), turns in results.items():
        speeds = [speed for speed, _ in turns]
        alone = [speed for speed, _ in results[arm, min(count for _, count in results)]]
        ratios = [speed / one for speed, one in zip(speeds, alone, strict=True)]
        lines.append(
            {
                "asked": arm,
                "processes": count,
                "requests_per_second": [round(speed, 1) for speed in speeds],
                "median": round(statistics.median(speeds), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
                "client_cores": round(statistics.median(cores for _, cores in turns), 2),
            }
        )
    return lines


def start(args: argparse.Namespace, folder: Path, count: int) -> Any:
    arguments = ["--served-model-name", "base", "--max-model-len", "256", "--dtype", "float32"]
    arguments += ["--kv-cache-memory-bytes", str(64 << 20), "--api-server-count", str(count)]
    arguments += ["--disable-uvicorn-access-log", "--no-adapter-probe"]
    arguments += ["--adapter", f"small-0={folder / 'small-0'}"]
    arguments += ["--enforce-eager"] if args.eager else []
    return serve(args.model, folder / f"log-{count}", arguments, warm=args.warm)


def main() -> None:
    parser = server_parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folder = Path(scratch)
        synthetic.save_tiny(base_model(args.model), folder, 1)
        servers = {
            count: running.enter_context(start(args, folder, count)) for count in args.counts
        }
        results = measure(servers, args.repetitions, args.seconds)
        for line in summary(results):
            print(json.dumps(line))
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "clients": CLIENTS}))


if __name__ == "__main__":
    main()
