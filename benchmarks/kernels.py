"""Microseconds per op of the CPU backends and of vLLM's own LoRA, and how near the floor they come.

    python -m molehill.benchmarks.kernels [--quick] [--sweeps rank ...] [--csv FILE] [--plot FILE]

One factor at a time around one workload: all four linears of a SmolLM2-135M layer in bfloat16,
DynMoLE with 8 experts of rank 8 on every projection, one adapter, 32 tokens. The model's 30 layers
are run one after the other, so that weights come from where a model's come from and not from the
first-level cache. The contestants take turns; each has its best and its median turn told.

The floor (see floor.py) is what the chosen experts need at the bandwidth and matrix-multiplication
rate that the same run measures. vLLM's static LoRA has the total rank of the mixture and no router.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from molehill.benchmarks import report
from molehill.benchmarks.arms import Arm, MixtureArm, VllmArm
from molehill.benchmarks.floor import ObservedMachine, work
from molehill.benchmarks.race import race
from molehill.benchmarks.report import Result, Row
from molehill.benchmarks.workload import (
    LAYERS,
    LINEARS,
    AdapterLayer,
    Point,
    make_inputs,
    make_layers,
)
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.policy import Constant, DynMoLE, Policy, Soft, TopK, TopP
from molehill.kernels.pytorch.backend import TorchBackend

DEFAULT = Point()
FFN = Point(op="ffn", policy=TopK(2))
# Plain LoRA is one expert of the mixtures' total rank.
PLAIN = replace(DEFAULT, policy=Constant((1.0,)), experts=1, rank=DEFAULT.experts * DEFAULT.rank)
POLICIES: tuple[Policy, ...] = (Soft(), TopK(2), TopP(0.75), DynMoLE())
POWERS = tuple(2**i for i in range(12))
SWEEPS = {
    "tokens": [
        replace(DEFAULT, op=op, tokens=tokens) for op in ("layer", *LINEARS) for tokens in POWERS
    ],
    "ffn": [replace(FFN, tokens=tokens) for tokens in POWERS],
    "rank": [replace(DEFAULT, rank=rank) for rank in POWERS[1:7]],
    "experts": [replace(DEFAULT, experts=experts) for experts in POWERS[:6]],
    "policy": [PLAIN, *(replace(DEFAULT, policy=policy) for policy in POLICIES)],
    "adapters": [replace(DEFAULT, adapters=adapters) for adapters in POWERS[:6]],
}
QUICK_LAYERS, QUICK_SECONDS = 4, 0.1


def quick(points: Sequence[Point]) -> list[Point]:
    """The ends of a sweep, of 32 tokens at most and no single linears."""
    small = [point for point in points if point.tokens <= 32 and point.op not in LINEARS]
    return [small[0], small[-1]]


class KernelBench:
    """Measures points; keeps the arms while points differ in op and tokens only."""

    def __init__(self, depth: int, seconds: float) -> None:
        self.depth, self.seconds = depth, seconds
        self.machine = ObservedMachine()
        self._loaded: Point | None = None
        self._layers: list[AdapterLayer] = []
        self._arms: dict[str, Arm] = {}

    def measure(self, sweep: str, point: Point) -> Result:
        """One point. What the machine can do is known when all are measured."""
        self._load(point)
        inputs = make_inputs(point.tokens)
        runs = {name: arm.prepare(point, inputs) for name, arm in self._arms.items()}
        timings = race(runs, self.depth, self.seconds)
        needed = work(self._layers, point, inputs)
        self.machine.observe(needed.resident)
        return Result(sweep, point, timings, needed)

    def _load(self, point: Point) -> None:
        key = replace(point, op="ffn" if point.is_ffn else "layer", tokens=1)
        if key == self._loaded:
            return
        self._arms.clear()
        self._layers = make_layers(point, self.depth)
        self._arms["cpp"] = MixtureArm(CpuBackend(), self._layers, point.adapters)
        self._arms["torch"] = MixtureArm(TorchBackend(), self._layers, point.adapters)
        try:
            self._arms["vllm"] = VllmArm(self._layers, point.adapters)
        except ImportError as error:
            print(f"vLLM's own LoRA is left out: {error}", file=sys.stderr)
        self._loaded = key


def measure(sweeps: Sequence[str], is_quick: bool, seconds: float) -> list[Row]:
    """The rows of the sweeps; tells of each point on the standard error."""
    bench = KernelBench(QUICK_LAYERS if is_quick else LAYERS, seconds)
    results = []
    for sweep in sweeps:
        for point in quick(SWEEPS[sweep]) if is_quick else SWEEPS[sweep]:
            results.append(bench.measure(sweep, point))
            print(report.line(report.row(results[-1], bench.machine)), file=sys.stderr)
    return [report.row(result, bench.machine) for result in results]


def warn_if_busy() -> None:
    """Two spinning thread pools on the same cores slow each other down a hundredfold."""
    load = os.getloadavg()[0]
    if load > 1:
        print(f"The machine is busy (load {load:.1f}): these figures say little", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of one point")
    parser.add_argument("--quick", action="store_true", help="the ends of each sweep, four layers")
    parser.add_argument("--csv", type=Path, help="a file instead of the standard output")
    parser.add_argument("--plot", type=Path, help="a figure (needs matplotlib)")
    options = parser.parse_args(arguments)
    seconds = min(options.seconds, QUICK_SECONDS) if options.quick else options.seconds
    warn_if_busy()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(options.sweeps, options.quick, seconds)
    report.write_csv(rows, options.csv)
    if options.plot:
        report.plot(rows, options.plot)


if __name__ == "__main__":
    main()
