"""Microseconds per op of the CPU backends, and how near the C++ one comes to the machine's limits.

    python -m molehill.benchmarks.kernels [--tokens 1 8 32] [--csv FILE] [--plot FILE]

The layers of SmolLM2-135M in bfloat16, a stack of them deep, so that weights come from where a
model's come from and not from the first-level cache. Backends take turns and each op keeps its best
time. The floor is what the chosen experts need at the bandwidth and matrix-multiplication rate that
the same run measures: max(bytes / bandwidth, operations / rate).
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from molehill.kernels.backend import (
    Backend,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import DynMoLE, Policy, TopK
from molehill.kernels.torch_backend import TorchBackend

DTYPE = torch.bfloat16
HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, RANK = 576, 1536, 30, 8, 8
# Fused linears: input width, and the output widths of the projections.
LINEARS = {
    "qkv": (HIDDEN, (576, 192, 192)),
    "o": (HIDDEN, (576,)),
    "gate_up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Standard deviation of the router logits: about two experts of eight are chosen by DynMoLE.
LOGITS = 3.0


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times in microseconds per op (per layer)."""

    op: str
    tokens: int
    threads: int
    cpp_us: float
    torch_us: float
    floor_us: float
    floor_share: float


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes per second of a large sum; rate: multiply-adds per second of a GEMM."""

    bandwidth: float
    rate: float


class Stack:
    """LAYERS layers of one backend, with a DynMoLE on each linear or a MixLoRA on each FFN."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.linears: dict[str, list[Tensor]] = {name: [] for name in LINEARS}
        self.ffns: list[Tensor] = []
        for layer in range(LAYERS):
            for name, (inputs, outputs) in LINEARS.items():
                shape = LinearShape(f"{layer}.{name}", inputs, sum(outputs), DTYPE)
                self.linears[name].append(torch.tensor([backend.register_linear(shape)]))
            gate_up, down = (int(self.linears[name][-1]) for name in ("gate_up", "down"))
            ffn = FfnShape(f"{layer}.mlp", gate_up, down, INTERMEDIATE)
            self.ffns.append(torch.tensor([backend.register_ffn(ffn)]))
        backend.store(0, SlotWeights(self._pieces(), {}))
        backend.store(1, SlotWeights({}, {int(ffn): _ffn_piece() for ffn in self.ffns}))

    def _pieces(self) -> dict[int, list[LinearPiece]]:
        return {
            int(handle): _linear_pieces(name)
            for name, handles in self.linears.items()
            for handle in handles
        }

    def linear(self, name: str, tokens: int) -> Callable[[], None]:
        """All layers' linears called `name`, on one batch."""
        inputs, outputs = LINEARS[name]
        x, out = _random(tokens, inputs), _random(tokens, sum(outputs))

        def run() -> None:
            for handle in self.linears[name]:
                self.backend.linear_op(out, x, handle)

        return run

    def ffn(self, tokens: int) -> Callable[[], None]:
        """All layers' FFN mixtures: the three ops that they add to a layer."""
        x, out = _random(tokens, HIDDEN), _random(tokens, HIDDEN)
        pre, h = _random(tokens, 2 * INTERMEDIATE), _random(tokens, INTERMEDIATE)

        def run() -> None:
            ups, downs = self.linears["gate_up"], self.linears["down"]
            for up, ffn, down in zip(ups, self.ffns, downs, strict=True):
                self.backend.linear_op(pre, x, up)
                self.backend.ffn_op(h, pre, ffn)
                self.backend.linear_op(out, h, down)

        return run


def _random(*shape: int) -> Tensor:
    values: Tensor = torch.randn(*shape, dtype=DTYPE)
    return values


def _experts(inputs: int, outputs: int) -> Experts:
    rank = EXPERTS * RANK
    # A small B keeps the outputs, to which every repetition adds, finite.
    a, b = torch.randn(rank, inputs) / math.sqrt(inputs), torch.randn(outputs, rank) * 1e-3
    return Experts(a, b, (RANK,) * EXPERTS)


def _router(inputs: int) -> Tensor:
    deviation = LOGITS / math.sqrt(inputs)
    return torch.randn(EXPERTS, inputs) * deviation


def _linear_pieces(name: str) -> list[LinearPiece]:
    inputs, outputs = LINEARS[name]
    policy: Policy = DynMoLE()
    return [
        LinearPiece(
            f"{name}.{i}", sum(outputs[:i]), _experts(inputs, width), policy, _router(inputs)
        )
        for i, width in enumerate(outputs)
    ]


def _ffn_piece() -> FfnPiece:
    wide, narrow = _experts(HIDDEN, INTERMEDIATE), _experts(INTERMEDIATE, HIDDEN)
    up = _experts(HIDDEN, INTERMEDIATE)
    return FfnPiece("mlp", TopK(2), _router(HIDDEN), "silu", wide, up, narrow)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_of_turns(runs: Sequence[Callable[[], None]], budget: float) -> list[float]:
    """Best seconds of each, taking turns for `budget` seconds and three times at least."""
    best = [float("inf")] * len(runs)
    start, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - start < budget:
        best = [min(b, _seconds(run)) for b, run in zip(best, runs, strict=True)]
        turns += 1
    return best


def measure_machine() -> Machine:
    """Reads as many bytes as the benchmark's adapter has, and multiplies square matrices."""
    data, matrix = torch.zeros(11 << 20), _random(1024, 1024)
    total, product = torch.zeros(()), torch.zeros_like(matrix)

    def read() -> None:
        torch.sum(data, 0, out=total)

    def multiply() -> None:
        torch.mm(matrix, matrix, out=product)

    reading, multiplying = best_of_turns([read, multiply], 1.0)
    return Machine(data.nbytes / reading, 1024**3 / multiplying)


def floor_seconds(machine: Machine, stack: Stack, run: Callable[[], None], tokens: int) -> float:
    """What one pass over all layers' chosen experts costs at the machine's limits."""
    stack.backend.trace(True)
    run()
    traces = stack.backend.trace(False)
    moved = done = 0.0
    for trace in traces:
        chosen = trace.weights != 0
        used, pairs = int(chosen.any(0).sum()), int(chosen.sum())
        inputs, per_expert = _sizes(trace.site)
        moved += 4 * EXPERTS * inputs + 2 * used * per_expert
        done += tokens * EXPERTS * inputs + pairs * per_expert
    return max(moved / machine.bandwidth, done / machine.rate)


def _sizes(site: str) -> tuple[int, int]:
    """Input width of a site's router, and the numbers in one expert's A and B."""
    if site == "mlp":
        return HIDDEN, RANK * 3 * (HIDDEN + INTERMEDIATE)
    name, index = site.split(".")
    inputs, outputs = LINEARS[name]
    return inputs, RANK * (inputs + outputs[int(index)])


def measure(tokens: Sequence[int], budget: float) -> list[Row]:
    """A row per op and number of tokens."""
    machine, cpp, plain = measure_machine(), Stack(CpuBackend()), Stack(TorchBackend())
    rows = []
    for count in tokens:
        for op in [*LINEARS, "ffn"]:
            runs = []
            for stack in (cpp, plain):
                stack.backend.begin_step([Run(1 if op == "ffn" else 0, 0, count)])
                runs.append(stack.ffn(count) if op == "ffn" else stack.linear(op, count))
            best = best_of_turns(runs, budget)
            floor = floor_seconds(machine, cpp, runs[0], count)
            fast, slow, least = (seconds / LAYERS * 1e6 for seconds in (*best, floor))
            rows.append(Row(op, count, torch.get_num_threads(), fast, slow, least, least / fast))
    return rows


def write_csv(rows: Sequence[Row], path: Path | None) -> None:
    """To a file, or to the standard output."""
    file = path.open("w", newline="") if path else sys.stdout
    writer = csv.DictWriter(file, [f.name for f in fields(Row)])
    writer.writeheader()
    for row in rows:
        figures = asdict(row).items()
        writer.writerow({k: round(v, 3) if isinstance(v, float) else v for k, v in figures})
    if path:
        file.close()


def plot(rows: Sequence[Row], path: Path) -> None:
    """Microseconds over tokens, one panel per op. Needs matplotlib."""
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    ops = list(dict.fromkeys(row.op for row in rows))
    figure, axes = pyplot.subplots(1, len(ops), figsize=(3.2 * len(ops), 3), sharey=True)
    for panel, op in zip(axes, ops, strict=True):
        own = [row for row in rows if row.op == op]
        for name in ("torch_us", "cpp_us", "floor_us"):
            panel.loglog([r.tokens for r in own], [getattr(r, name) for r in own], label=name)
        panel.set(title=op, xlabel="tokens")
    axes[0].set_ylabel("microseconds per layer")
    axes[0].legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of one op and size")
    parser.add_argument("--csv", type=Path, help="a file instead of the standard output")
    parser.add_argument("--plot", type=Path, help="a figure (needs matplotlib)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(arguments.tokens, arguments.seconds)
    write_csv(rows, arguments.csv)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
