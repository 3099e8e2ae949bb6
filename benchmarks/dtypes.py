"""Whole-engine throughput in bfloat16 and in float32 on this processor, taking turns in one run.

The base and DynMoLE on all projections, eager, as benchmarks/engine.py measures them.

Usage: python -m molehill.benchmarks.dtypes MODEL [--repetitions N]
"""

import argparse
import os
import statistics
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from molehill.benchmarks import engine
from molehill.benchmarks.engine import Point, Sample, progress

DTYPES = ("bfloat16", "float32")
ARMS = {"b": "base", "d": "DynMoLE"}
POINTS = (
    Point("decode, batch 1", 1, 16, 24),
    Point("decode, batch 8", 8, 16, 16),
    Point("prefill, 1 x 128", 1, 128, 1),
)


def run(
    engines: dict[str, Any], requests: dict[str, dict[str, list[Any]]], repetitions: int
) -> list[Sample]:
    """Samples whose arm is (dtype, arm), the first repetition left out."""
    samples = []
    for repetition in range(-1, repetitions):
        for point, arm, dtype in product(POINTS, ARMS, DTYPES):
            speed = engine.measure(engines[dtype], point, requests[dtype][arm], repetition)
            progress(f"{repetition:2} {point.name:18} {ARMS[arm]:8} {dtype:9} {speed:8.1f}")
            if repetition >= 0:
                samples.append(Sample(f"{dtype} {arm}", point.name, repetition, speed))
    return samples


def report(samples: list[Sample]) -> str:
    lines = []
    for point, arm in product(POINTS, ARMS):
        names = [f"{dtype} {arm}" for dtype in DTYPES]
        best = [
            max(s.speed for s in samples if (s.arm, s.point) == (name, point.name))
            for name in names
        ]
        values = engine.ratios(samples, names[1], names[0], point.name)
        lines.append(
            f"{point.name:18} {ARMS[arm]:8} tokens/s "
            + "  ".join(f"{dtype} {speed:.1f}" for dtype, speed in zip(DTYPES, best, strict=True))
            + f"  float32 over bfloat16: median {statistics.median(values):.2f} "
            f"({min(values):.2f} to {max(values):.2f}, {len(values)} repetitions)"
        )
    return "\n".join(lines)


def main() -> None:
    from molehill.benchmarks import synthetic

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    arms = "".join(ARMS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lora = synthetic.save_lora(
            engine.adapter_options(args.model)["base"], engine.RANK, folder / "lora"
        )
        engines: dict[str, Any] = {}
        requests = {}
        for dtype in DTYPES:
            options = {"dtype": dtype, "enforce_eager": True}
            running = engine.running_engines(args.model, arms, lora, options)
            arms_engines = stack.enter_context(running)
            engines[dtype] = arms_engines["molehill"]
            requests[dtype] = engine.make_requests(
                arms_engines, arms, args.model, folder / dtype, lora
            )
        samples = run(engines, requests, args.repetitions)
    host = engine.host()
    print(f"{host['cpu']}, {host['cores']} cores, load {os.getloadavg()[0]:.1f}")
    print(report(samples))


if __name__ == "__main__":
    main()
