"""What the Triton backend launches and reads, counted without a GPU.

    python -m molehill.benchmarks.launches                 launches, programs and bytes of a layer
    python -m molehill.benchmarks.launches --compile 90    registers, spills, shared memory (ptxas)

Launches are counted by running the backend itself with kernels that only note their grid. Bytes
are arithmetic on shapes: what is read from or written to memory once, caches holding the rest.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from molehill.benchmarks.compiled import ARCHITECTURES, compile_for, specialisations
from molehill.kernels.interface import BaseActivation, FfnShape, LinearShape, Run
from molehill.kernels.triton import activate, expand, gate, shrink
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.launch_config import Capacity, LaunchConfig, launch_config_for

HALF, FLOAT = 2, 4


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer: attention projections' widths, hidden and intermediate size."""

    name: str
    hidden: int
    qkv: tuple[int, int, int]
    intermediate: int

    @property
    def linears(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """(in, outs) of each fused linear."""
        return {
            "qkv": (self.hidden, self.qkv),
            "o": (self.qkv[0], (self.hidden,)),
            "gate_up": (self.hidden, (self.intermediate, self.intermediate)),
            "down": (self.intermediate, (self.hidden,)),
        }


LAYERS = (
    DecoderLayer("Llama-3.1-8B", 4096, (4096, 1024, 1024), 14336),
    DecoderLayer("SmolLM2-135M", 576, (576, 192, 192), 1536),
)


@dataclass(frozen=True)
class AdapterLoad:
    """One adapter on every projection, one router each: E experts of rank r, k chosen."""

    tokens: int
    experts: int = 8
    rank: int = 16
    chosen: int = 2

    @property
    def touched(self) -> float:
        """Experts that at least one token chose, if choices are even and independent."""
        share = 1 - self.chosen / self.experts
        return float(self.experts * (1 - share**self.tokens))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one linear in one step, base weights in bf16.

    floor: adapter weights that no implementation can leave unread (routers, chosen experts).
    weights: adapter weights that the kernels read (A of all experts). scratch: partial sums
    written and read back once, and the finished rows.
    """

    base: float
    floor: float
    weights: float
    scratch: float


def traffic(
    features: int, outs: tuple[int, ...], load: AdapterLoad, config: LaunchConfig
) -> Traffic:
    """The launches of one linear; its output is read and written once more beside that."""
    rows, out = load.experts * load.rank, sum(outs)
    routers = len(outs) * load.experts * features * FLOAT
    a = len(outs) * rows * features * HALF
    b = rows * out * HALF
    share = load.touched / load.experts
    sums = len(outs) * (rows + load.experts) * load.tokens * FLOAT
    finished = len(outs) * rows * load.tokens * HALF
    return Traffic(
        base=features * out * HALF,
        floor=routers + share * (a + b),
        weights=routers + a + share * b,
        scratch=2 * (sums * config.splits(load.tokens, features) + finished),
    )


class Counter:
    """Stands in for a kernel and notes the grids of its launches."""

    def __init__(self, name: str, notes: list[tuple[str, int]]) -> None:
        self.name, self.notes = name, notes

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            programs = 1
            for size in grid:
                programs *= size
            self.notes.append((self.name, programs))

        return launch


def launches(layer: DecoderLayer, tokens: int, capacity: Capacity) -> list[tuple[str, int]]:
    """(kernel, programs) of every launch of one layer in a captured graph, where that of the FFN's
    activation takes the place of one of the base's."""
    notes: list[tuple[str, int]] = []
    kernels = ((shrink, "shrink"), (gate, "gate"), (expand, "expand"), (activate, "activate"))
    patched = [
        (module, f"{name}_kernel", getattr(module, f"{name}_kernel")) for module, name in kernels
    ]
    backend = TritonBackend(torch.device("cpu"), capacity)
    shapes = {
        name: LinearShape(name, features, sum(outs), torch.bfloat16)
        for name, (features, outs) in layer.linears.items()
    }
    handles = {name: backend.register_linear(shape) for name, shape in shapes.items()}
    silu = BaseActivation("silu", is_rounded=False)
    shape = FfnShape("mlp", handles["gate_up"], handles["down"], layer.intermediate, silu)
    mlp = backend.register_ffn(shape)

    def zeros(width: int) -> Tensor:
        return torch.zeros(tokens, width, dtype=torch.bfloat16)

    try:
        for module, name, _ in patched:
            setattr(module, name, Counter(name.removesuffix("_kernel"), notes))
        backend.begin_step([Run(0, 0, tokens)])
        for name, handle in handles.items():
            linear = shapes[name]
            backend.linear(zeros(linear.out_features), zeros(linear.in_features), handle)
            if name == "gate_up":
                backend.activate(zeros(layer.intermediate), zeros(linear.out_features), mlp)
    finally:
        for module, name, kernel in patched:
            setattr(module, name, kernel)
    return notes


def layer_tables() -> Iterator[str]:
    """Markdown: launches and traffic of each layer for a few sizes of step."""
    capacity = Capacity(adapters=8, tokens=4096, memory=1 << 20)
    load = AdapterLoad(1)
    yield f"E={load.experts}, r={load.rank}, k={load.chosen}, one adapter, all projections, bf16\n"
    yield "| layer | tokens | launches | programs | base MB | floor | read | scratch |"
    yield "|---|---|---|---|---|---|---|---|"
    for layer in LAYERS:
        for tokens in (1, 8, 32, 256, 4096):
            notes = launches(layer, tokens, capacity)
            config = launch_config_for(tokens, capacity)
            parts = [
                traffic(features, outs, AdapterLoad(tokens), config)
                for features, outs in layer.linears.values()
            ]
            base = sum(part.base for part in parts)
            shares = [
                f"+{100 * sum(getattr(part, name) for part in parts) / base:.1f} %"
                for name in ("floor", "weights", "scratch")
            ]
            programs = sum(count for _, count in notes)
            cells = [layer.name, tokens, len(notes), programs, f"{base / 1e6:.1f}", *shares]
            yield "| " + " | ".join(map(str, cells)) + " |"


def compiled_rows(architectures: list[int], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    for specialisation in specialisations(Capacity(adapters=8, tokens=8192)):
        if specialisation.dtype in dtypes:
            for architecture in architectures:
                names = {
                    "kernel": specialisation.name,
                    "step": specialisation.step,
                    "dtype": specialisation.dtype,
                }
                names["sm"] = str(architecture)
                yield names | asdict(compile_for(specialisation, architecture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", type=int, nargs="*", metavar="SM", help="e.g. 80 90 100")
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--json", action="store_true", help="one object per specialisation")
    options = parser.parse_args()
    if options.compile is None:
        print("\n".join(layer_tables()))
        return
    rows = compiled_rows(options.compile or list(ARCHITECTURES), options.dtype)
    for i, row in enumerate(rows):
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        if i == 0:
            print("| " + " | ".join(row) + " |")
            print("|" + "---|" * len(row))
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
