"""What scraping costs: throughput with a scraper against throughput without, by turns.

    python benchmarks/metrics_cost.py .models/SmolLM2-135M-Instruct

One server, adapters of random weights, waves of requests that fill a batch. Turns with and without
a scraper alternate, and so does which comes first. The last scraper meets 1,000 adapters. Run it on
a machine that does nothing else: a ratio's spread says what it is worth.

Counting itself cannot be switched off, so that it has no arm of its own.
"""

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import Server, serve  # type: ignore[import-not-found]

EXPERTS, RANK, SHARPNESS = 8, 8, 2.0
PROMPT = 16
# What a scraper asks for, and how often in seconds.
SCRAPERS = {"metrics": (("/metrics",), 1.0), "dashboard": (("/v1/routing", "{routing}"), 2.0)}


@dataclass(frozen=True)
class RequestLoad:
    """batch: requests at once, over `adapters` adapters. tokens: that each generates."""

    batch: int
    adapters: int
    tokens: int


@dataclass(frozen=True)
class ScrapeTurn:
    """speed: generated tokens per second. scrapes: seconds that each took."""

    speed: float
    scrapes: tuple[float, ...]


def save_adapters(model: str, folder: Path, number: int) -> list[Path]:
    from molehill.benchmarks import synthetic
    from molehill.engine.hf.shapes import base_model

    base = base_model(model)
    sizes = synthetic.input_sizes(model)
    options = {
        "base": base,
        "number": EXPERTS,
        "rank": RANK,
        "sharpness": SHARPNESS,
        "sizes": sizes,
    }
    return [
        synthetic.save(synthetic.dynmole, folder / f"a{i}", **options, seed=i)
        for i in range(number)
    ]


def save_small(model: str, folder: Path, number: int) -> list[Path]:
    from molehill.benchmarks import synthetic
    from molehill.engine.hf.shapes import base_model

    return synthetic.save_tiny(base_model(model), folder, number)


def generate(server: Server, adapter: str, load: RequestLoad, seed: int) -> None:
    generator = random.Random(seed)
    body = {
        "model": adapter,
        "prompt": [generator.randrange(100, 40000) for _ in range(PROMPT)],
        "max_tokens": load.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    generated = post(server, "/v1/completions", body)["usage"]["completion_tokens"]
    if generated != load.tokens:
        raise RuntimeError(f"found {generated} tokens, expected {load.tokens}")


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


@contextlib.contextmanager
def scraping(server: Server, paths: Sequence[str], pause: float) -> Iterator[list[float]]:
    """Asks for all paths every `pause` seconds; the list gets the seconds of each answer."""
    taken: list[float] = []
    stop = threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            for path in paths:
                start = time.perf_counter()
                server.get(path, timeout=60)
                taken.append(time.perf_counter() - start)
            stop.wait(pause)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()


def turn(server: Server, load: RequestLoad, seed: int, scraper: str) -> ScrapeTurn:
    """One wave of requests. scraper: of SCRAPERS, or empty."""
    paths, pause = SCRAPERS.get(scraper, ((), 0.0))
    paths = tuple(path.format(routing="/v1/adapters/a0/routing") for path in paths)
    watched: contextlib.AbstractContextManager[list[float]] = contextlib.nullcontext([])
    if scraper:
        watched = scraping(server, paths, pause)
    names = [f"a{i % load.adapters}" for i in range(load.batch)]
    with watched as taken, ThreadPoolExecutor(load.batch) as pool:
        start = time.perf_counter()
        jobs = [
            pool.submit(generate, server, name, load, seed * load.batch + i)
            for i, name in enumerate(names)
        ]
        for job in jobs:
            job.result()
        seconds = time.perf_counter() - start
    return ScrapeTurn(load.batch * load.tokens / seconds, tuple(taken))


def measure(
    server: Server, load: RequestLoad, scraper: str, repetitions: int
) -> list[tuple[ScrapeTurn, ScrapeTurn]]:
    """(with a scraper, without) by repetition, after one of each that warms up."""
    seeds = itertools.count()
    results = []
    for repetition in range(-1, repetitions):
        order = (scraper, "") if repetition % 2 else ("", scraper)
        turns = {arm: turn(server, load, next(seeds), arm) for arm in order}
        if repetition >= 0:
            results.append((turns[scraper], turns[""]))
            print(f"{repetition} {turns[scraper].speed:.1f} {turns[''].speed:.1f}", file=sys.stderr)
    return results


def register(server: Server, small: Sequence[Path]) -> int:
    """Loads all of `small`; returns how many adapters are registered then."""
    for path in small:
        body = {"name": path.name, "source": str(path), "allow_noop": True}
        post(server, "/v1/adapters", body)
    return len(json.loads(server.get("/v1/adapters"))["data"])


def report(scraper: str, load: RequestLoad, pairs: Sequence[tuple[ScrapeTurn, ScrapeTurn]]) -> str:
    ratios = [watched.speed / alone.speed for watched, alone in pairs]
    answers = [seconds for watched, _ in pairs for seconds in watched.scrapes]
    median = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    return (
        f"{scraper} every {SCRAPERS[scraper][1]:g} s, batch {load.batch} over {load.adapters} "
        f"adapters: speed with / without median {median:.4f}, quartiles {quartiles[0]:.4f} to "
        f"{quartiles[2]:.4f}, all {min(ratios):.4f} to {max(ratios):.4f}, {len(ratios)} "
        f"repetitions; an answer took {1000 * statistics.median(answers):.1f} ms (median of "
        f"{len(answers)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--registered", type=int, default=1000)
    args = parser.parse_args()
    load = RequestLoad(args.batch, args.adapters, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        named = enumerate(save_adapters(args.model, folder, load.adapters))
        small = save_small(args.model, folder / "root", args.registered - load.adapters)
        arguments = ["--max-model-len", "2048", "--no-enable-prefix-caching"]
        arguments += ["--adapter-root", str(folder / "root")]
        arguments += ["--max-adapters", str(args.registered)]
        for i, path in named:
            arguments += ["--adapter", f"a{i}={path}"]
        with serve(Path(args.model), folder / "log", arguments) as server:
            for scraper in SCRAPERS:
                pairs = measure(server, load, scraper, args.repetitions)
                print(report(scraper, load, pairs), flush=True)
            print(f"{register(server, small)} registered adapters:")
            pairs = measure(server, load, "metrics", args.repetitions)
            print(report("metrics", load, pairs), flush=True)


if __name__ == "__main__":
    main()
