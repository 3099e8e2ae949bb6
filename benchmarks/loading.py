"""What a running stream feels while an adapter loads: the longest gap between two of its tokens.

One stream of base tokens runs; beside it adapters are loaded and removed, in turn by `add_lora`
alone, which reads, checks and copies between two steps; in two phases, of which only the copy is
between two steps; and as the server does, which also reads and stores in its own process first. A
fourth arm loads nothing. Install is the second phase alone, the wait for the running step included.
`molehill.benchmarks.stages` says what the stages of a load take, without an engine.

Usage: python -m molehill.benchmarks.loading MODEL [--repetitions N] [--kind dynmole|lora]
    [--experts E] [--rank R]
"""

import argparse
import asyncio
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# Seconds: of one measurement, and before the load begins in it.
WINDOW, QUIET = 2.0, 0.5

installs: list[float] = []

LoadAdapter = Callable[[Any, Any], Awaitable[None]]


async def nothing(engine: Any, request: Any) -> None:
    await asyncio.sleep(0)


async def between_steps(engine: Any, request: Any) -> None:
    await engine.add_lora(request)


async def two_phases(engine: Any, request: Any) -> None:
    from molehill.api.vllm.worker_client import WorkerClient

    workers = WorkerClient(engine)
    await workers.prepare(request)
    start = time.perf_counter()
    await workers.install(request)
    installs.append(time.perf_counter() - start)


async def as_the_server(engine: Any, request: Any) -> None:
    from molehill.api.adapters.background import Background
    from molehill.api.adapters.generation import content_of
    from molehill.api.app import workers_cores
    from molehill.engine import formats
    from molehill.engine.formats import native

    def read_into_store(folder: str) -> None:
        adapter = formats.read(Path(request.lora_path))
        path = Path(folder) / adapter.digest
        native.write(adapter, path)
        content_of(adapter, path)

    background = Background(await workers_cores(engine))
    with tempfile.TemporaryDirectory() as folder:
        await background.run(read_into_store, folder)
        await two_phases(engine, request)


ARMS: dict[str, LoadAdapter] = {
    "no load": nothing,
    "read between steps": between_steps,
    "prepared in a thread": two_phases,
    "as the server loads": as_the_server,
}


async def stream(engine: Any, times: list[float]) -> None:
    """Writes down when each token of an endless base request arrives."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    for number in itertools.count():
        async for _ in engine.generate("The lamp", params, f"stream-{number}"):
            times.append(time.perf_counter())


async def measure(
    engine: Any, load: LoadAdapter, request: Any, times: list[float]
) -> tuple[float, float]:
    """(longest gap, seconds that the load took)."""
    await asyncio.sleep(QUIET)
    start = time.perf_counter()
    await load(engine, request)
    seconds = time.perf_counter() - start
    await asyncio.sleep(WINDOW)
    window = [at for at in times if at >= start - QUIET / 2]
    gap = max(after - before for before, after in itertools.pairwise(window))
    await engine.remove_lora(request.lora_int_id)
    return gap, seconds


async def run(args: argparse.Namespace) -> None:
    from vllm import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from molehill.benchmarks.synthetic import dynmole, lora
    from molehill.engine.formats import native
    from molehill.engine.hf.shapes import base_model
    from molehill.engine.vllm.compilation import WORKER, allow_compilation

    allow_compilation()
    engine_args = AsyncEngineArgs(
        model=args.model,
        enable_lora=True,
        max_loras=8,
        max_lora_rank=max(8, args.rank),
        worker_cls=WORKER,
        max_model_len=2048,
        enforce_eager=args.eager,
    )
    engine = AsyncLLM.from_engine_args(engine_args)
    base = base_model(args.model)
    sizes = dict.fromkeys(base.linears, 1.0)
    if args.kind == "lora":
        adapter = lora(base, args.rank, seed=0)
    else:
        adapter = dynmole(base, args.experts, args.rank, 2.0, sizes, seed=0)
    gaps: dict[str, list[float]] = {name: [] for name in ARMS}
    loads: dict[str, list[float]] = {name: [] for name in ARMS}
    times: list[float] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            native.write(adapter, path)
            task = asyncio.create_task(stream(engine, times))
            while len(times) < 20:
                await asyncio.sleep(0.1)
            for repetition in range(args.repetitions):
                for number, (name, load) in enumerate(ARMS.items()):
                    request = LoRARequest(name, 1 + repetition * len(ARMS) + number, str(path))
                    gap, seconds = await measure(engine, load, request, times)
                    gaps[name].append(gap)
                    loads[name].append(seconds)
            task.cancel()
    finally:
        engine.shutdown()
    typical = statistics.median(b - a for a, b in itertools.pairwise(times))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{args.kind} of {adapter.num_bytes / 1e6:.1f} MB; a token takes {typical * 1e3:.1f} ms")
    for name in ARMS:
        gap, took = (statistics.median(times_by_arm[name]) * 1e3 for times_by_arm in (gaps, loads))
        worst = max(gaps[name]) * 1e3
        print(f"{name:22} longest gap {gap:6.1f} ms (worst {worst:6.1f}), load {took:6.1f} ms")
    print(f"install alone {statistics.median(installs) * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kind", choices=("dynmole", "lora"), default="dynmole")
    parser.add_argument("--experts", type=int, default=2, help="of DynMoLE")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
