"""What loading an adapter takes in each of its stages, in milliseconds and per megabyte, by kind.

The stages run in this process, in the threads that the server runs them in, without an engine: what
the API process does (read the client's files, check, digest, count, store), then what a worker does
(read the stored copy, merge, cut, pack for the C++ backend). Per megabyte of canonical float32.

Usage: python -m molehill.benchmarks.stages MODEL [--repetitions N] [--kinds NAME ...]
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

from molehill.api.adapters.background import Background
from molehill.api.adapters.generation import content_of
from molehill.benchmarks.host import host
from molehill.benchmarks.synthetic import dynmole, save, save_lora
from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.hf.shapes import base_model
from molehill.engine.system.cpu_affinity import affinity
from molehill.engine.transform.merge import merge_static
from molehill.engine.vllm.model.discovery import Linear
from molehill.engine.vllm.model.projections import Projection
from molehill.engine.vllm.model.sharding import cut_linear
from molehill.engine.vllm.prefetch import Prefetcher
from molehill.kernels.cpu.backend import CpuBackend
from molehill.kernels.interface import LinearPiece, LinearShape, SlotWeights
from molehill.kernels.mixture import LinearMixture

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    name_or_path="Llama-3.1-8B",
)
LAYER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


Writer = Callable[[BaseModel, Path], Path]


def small_dynmole(base: BaseModel, directory: Path) -> Path:
    """2 experts of rank 4 are as many rank rows as one of rank 8."""
    sizes = dict.fromkeys(base.linears, 1.0)
    return save(dynmole, directory, base=base, number=2, rank=4, sharpness=2.0, sizes=sizes, seed=0)


def lora(rank: int) -> Writer:
    return lambda base, directory: save_lora(base, rank, directory)


# By name: whether the base is that of 8B, and what writes the adapter.
KINDS: dict[str, tuple[bool, Writer]] = {
    "dynmole-2x4": (False, small_dynmole),
    "lora-8": (False, lora(8)),
    "lora-64": (False, lora(64)),
    "lora-64-8b": (True, lora(64)),
}


class Stages:
    """Milliseconds by stage, in the order in which they were measured."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.taken[name] = (time.perf_counter() - start) * 1e3


class Slots:
    """A backend with the fused linears of a base model, as vLLM's model on one rank has them."""

    def __init__(self, base: BaseModel) -> None:
        self.backend = CpuBackend()
        self._places: dict[str, tuple[int, Projection]] = {}
        for site in base.linears:
            parent, _, leaf = site.rpartition(".")
            fused = next((names for names in LAYER if names[0] == leaf), None)
            if fused is not None:
                self._register(base, [f"{parent}.{name}" for name in fused])

    def _register(self, base: BaseModel, sites: list[str]) -> None:
        inputs, width = base.linears[sites[0]][0], sum(base.linears[site][1] for site in sites)
        handle = self.backend.register_linear(LinearShape(sites[0], inputs, width, torch.bfloat16))
        start = 0
        for site in sites:
            out = base.linears[site][1]
            whole = (range(out),)
            place = Projection(site, inputs, out, whole, range(inputs), start)
            self._places[site] = handle, place
            start += out

    def cut(self, sites: dict[str, LinearMixture]) -> SlotWeights:
        linears: dict[int, list[LinearPiece]] = {}
        for site, mixture in sites.items():
            handle, place = self._places[site]
            # Only DoRA reads the linear and sums over ranks.
            linear = Linear(site, None, (place,))
            piece = cut_linear(mixture, linear, place, lambda total: total)
            linears.setdefault(handle, []).append(piece)
        return SlotWeights(linears, {})


def in_api(source: Path, store: Path, base: BaseModel, stages: Stages) -> tuple[Path, int]:
    """The stored copy and its bytes in float32."""
    limits = Limits()
    with stages.measured("read"):
        adapter = formats.read(source, limits)
    with stages.measured("check"):
        validate(adapter, base, limits)
    with stages.measured("digest"):
        path = store / adapter.digest
    with stages.measured("count"):
        content = content_of(adapter, path)
    with stages.measured("store"):
        native.write(adapter, path)
    return path, content.num_bytes


def in_worker(base: BaseModel, slots: Slots, stages: Stages, path: str, beside: bool) -> None:
    with stages.measured("read copy"):
        adapter = native.read_stored(Path(path))
    with stages.measured("merge"):
        merged, _ = merge_static(adapter, base)
    with stages.measured("cut"):
        linears = {s: m for s, m in merged.sites.items() if isinstance(m, LinearMixture)}
        cut = slots.cut(linears)
    with stages.measured("pack"):
        slots.backend.pack(cut)


def measure(kind: str, model: str, repetitions: int) -> None:
    """Prints one row: the fastest of `repetitions` in every stage."""
    large, write = KINDS[kind]
    base = base_model(LLAMA_8B if large else model)
    slots = Slots(base)
    cores = affinity()
    background = Background(cores - {max(cores)} if len(cores) > 1 else ())
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write(base, source)
        for repetition in range(repetitions):
            stages, store = Stages(), Path(folder) / f"store-{repetition}"
            api = background.run(in_api, source, store, base, stages)
            path, num_bytes = asyncio.run(api)
            prefetcher = Prefetcher(partial(in_worker, base, slots, stages))
            prefetcher.start(str(path))
            prefetcher.result(str(path))
            for name, taken in stages.taken.items():
                best[name] = min(taken, best.get(name, taken))
    megabytes, total = num_bytes / 1e6, sum(best.values())
    summary = ", ".join(f"{name} {taken:.1f}" for name, taken in best.items())
    print(
        f"{kind:12} {megabytes:6.1f} MB {total:8.1f} ms, {total / megabytes:6.2f} ms/MB: {summary}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    print(f"{host()['cpu']}, {len(affinity())} cores; milliseconds of each stage")
    for kind in args.kinds:
        measure(kind, args.model, args.repetitions)


if __name__ == "__main__":
    main()
