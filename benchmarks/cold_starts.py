"""What a request waits for its adapter, by where that is, and what a load takes, by its source.

    python benchmarks/cold_starts.py .models/SmolLM2-135M-Instruct [--streams 4]

One real server with two slots and host memory for a few of twelve adapters. A request in a slot's
reach, one whose adapter is in host memory and one whose adapter is in the store take turns; the
server's own counters say which found what. Then each source in turn is loaded under new names:
a directory, a URL of this machine (what a network takes comes on top), an upload.

The last line is what `benchmarks/fleet_simulation.py` is fed with: to read an adapter from the
store (disk less host), and to exchange one for another in a slot (host less worker).
"""

import argparse
import asyncio
import http.server
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from molehill.benchmarks.arguments import server_parser
from molehill.benchmarks.client import Client

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

# The tests start servers too; they are no package.
from support.server import serve  # type: ignore[import-not-found]

ADAPTERS, SLOTS, HOST_COPIES = 12, 2, 5
ADAPTER_BYTES = 10_000_000
STREAM_TOKENS = 256
TIERS = ("worker", "host", "disk")
Timings = dict[str, list[float]]


@contextmanager
def files(folder: Path) -> Iterator[str]:
    """URL of a folder, while it is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

    handler = partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


async def hits(client: Client) -> dict[str, float]:
    """Requests so far by the tier where they found their adapter."""
    found = dict.fromkeys(TIERS, 0.0)
    text = (await client.http.get("/metrics")).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "molehill_adapter_cache_hits_total":
                found[sample.labels["tier"]] += sample.value
    return found


async def ask(client: Client, model: str, seconds: Timings) -> None:
    """One token; its seconds go to the tier that the server counted it under."""
    before = await hits(client)
    start = time.perf_counter()
    failure = await client.complete(model, 1)
    elapsed = time.perf_counter() - start
    if failure:
        raise RuntimeError(failure)
    after = await hits(client)
    tier = next(tier for tier in TIERS if after[tier] > before[tier])
    seconds[tier].append(elapsed)


async def cold_starts(client: Client, names: Sequence[str], repetitions: int) -> Timings:
    """Rounds over all names, which push each other out of host memory; what was asked two requests
    ago has just left its slot."""
    seconds: Timings = {tier: [] for tier in TIERS}
    for turn in range(repetitions):
        latest = names[turn % len(names)]
        before = names[(turn - SLOTS) % len(names)]
        for model in (latest, latest, before):
            await ask(client, model, seconds)
    return seconds


async def loads(client: Client, root: Path, url: str, repetitions: int) -> Timings:
    """Seconds from asking for a load to an adapter that serves."""
    sources = sorted(root.iterdir())[:repetitions]
    seconds: Timings = {"directory": [], "URL": [], "upload": []}
    for number, folder in enumerate(sources):
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        asked = {
            "directory": client.load(f"directory-{number}", folder),
            "URL": client.load(f"url-{number}", f"{url}/{folder.name}"),
            "upload": client.upload(f"upload-{number}", contents),
        }
        for source, load in asked.items():
            start = time.perf_counter()
            await load
            seconds[source].append(time.perf_counter() - start)
            await client.unload(f"{source.lower()}-{number}")
    return seconds


async def stream(client: Client) -> None:
    """Without end, on the base model, which needs no slot."""
    while True:
        async for _ in client.stream(client.base, STREAM_TOKENS):
            pass


async def measure(server_url: str, root: Path, url: str, args: argparse.Namespace) -> list[Timings]:
    async with httpx.AsyncClient(base_url=server_url, timeout=600) as http_client:
        client = Client(http_client, "base")
        streams = [asyncio.create_task(stream(client)) for _ in range(args.streams)]
        try:
            by_source = await loads(client, root, url, args.repetitions)
            names = [folder.name for folder in sorted(root.iterdir())]
            for name in names:
                await client.load(name, root / name)
            return [await cold_starts(client, names, 3 * args.repetitions), by_source]
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)


def report(by_tier: Timings, by_source: Timings) -> list[str]:
    lines = [
        f"{what} {place:9} median {1e3 * statistics.median(seconds):6.0f} ms "
        f"({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}, {len(seconds)} times)"
        for what, timings in (("first token from", by_tier), ("load from", by_source))
        for place, seconds in timings.items()
    ]
    worker, host, disk = (1e3 * statistics.median(by_tier[tier]) for tier in TIERS)
    return [*lines, f"--read-ms {disk - host:.0f} --install-ms {host - worker:.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    from molehill.benchmarks import synthetic
    from molehill.benchmarks.host import host
    from molehill.engine.hf.shapes import base_model

    parser = server_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--streams", type=int, default=4, help="of the base model, beside it")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        folders = [root / f"adapter-{number:02}" for number in range(ADAPTERS)]
        synthetic.save_dynmoles(base_model(args.model), ADAPTER_BYTES, folders)
        with files(root) as url:
            options = [
                *("--max-model-len", "512", "--served-model-name", "base"),
                *("--adapter-root", str(root), "--allow-url-prefix", url),
                *("--max-loras", str(SLOTS), "--no-enable-prefix-caching"),
                *("--adapter-host-memory", str(HOST_COPIES * ADAPTER_BYTES)),
                *(["--enforce-eager"] if args.eager else []),
            ]
            with serve(args.model, Path(scratch) / "log", options, warm=args.warm) as server:
                timings = asyncio.run(measure(server.url, root, url, args))
    print(f"{host()}\n{args.streams} streams; adapters of {ADAPTER_BYTES / 1e6:.0f} MB in float32")
    print("\n".join(report(*timings)))


if __name__ == "__main__":
    main()
