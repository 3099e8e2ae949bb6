"""Who is measured: the base, and adapters on molehill's engine and on vLLM's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molehill.benchmarks import synthetic
from molehill.benchmarks.limits import AdapterWork
from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel

PLAIN, MOLEHILL, VLLM_LORA = "plain vLLM", "molehill", "vLLM's LoRA"
PLAIN_BASE = "plain vLLM, base"
# Ranks that vLLM's own LoRA takes for the largest.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Contestant:
    """paths: of its adapters, which the prompts of a batch take in turn; none for the base. work:
    of one adapter. engine: one of the three above."""

    name: str
    engine: str
    paths: tuple[Path, ...] = ()
    work: AdapterWork | None = None

    @property
    def routes(self) -> bool:
        return self.work is not None and self.work.routed > 0


@dataclass(frozen=True)
class Mixtures:
    """How the synthetic ones are made, DynMoLE and MixLoRA: `experts` of one `rank`.

    sharpness: standard deviation of the routers' logits. sizes: root mean square of what each
    linear reads, by site.
    """

    base: BaseModel
    experts: int
    rank: int
    sharpness: float
    sizes: Mapping[str, float]

    def save(self, make: Callable[..., Any], directory: Path) -> Path:
        return synthetic.save(
            make,
            directory,
            base=self.base,
            number=self.experts,
            rank=self.rank,
            sharpness=self.sharpness,
            sizes=self.sizes,
            seed=0,
        )


def line_up(
    adapters: Sequence[Path],
    mixtures: Callable[[], Mixtures],
    many: int,
    vs_vllm: bool,
    folder: Path,
) -> list[Contestant]:
    """All contestants, the plain base first.

    adapters: of the user; without any, synthetic ones are written to `folder`. many: adapters in
    one batch, copies of the first one; 1 for no such contestant. vs_vllm: also static LoRA of the
    first one's rank, on both engines. Raises AdapterError for an adapter that cannot be read.
    """
    contestants = [Contestant(PLAIN_BASE, PLAIN), Contestant("molehill, base", MOLEHILL)]
    named = [(path.name, path) for path in adapters]
    if not named:
        synthesised = mixtures()
        size = f"{synthesised.experts} x r {synthesised.rank}"
        named = [(f"DynMoLE {size}", synthesised.save(synthetic.dynmole, folder / "dynmole"))]
        if synthesised.base.ffns:
            path = synthesised.save(synthetic.mixlora, folder / "mixlora")
            named.append((f"MixLoRA top-2 of {size}", path))
    first = None
    for name, path in named:
        adapter = formats.read(path)
        work = AdapterWork.of(adapter)
        first = first or (name, path, work, rank_of(adapter))
        contestants.append(Contestant(name, MOLEHILL, (path,), work))
    assert first is not None
    name, path, work, rank = first
    if many > 1:
        contestants.append(Contestant(f"{many} x {name}", MOLEHILL, (path,) * many, work))
    if vs_vllm:
        lora = synthetic.save_lora(mixtures().base, rank, folder / "lora")
        static = AdapterWork.of(formats.read(lora))
        for engine in (MOLEHILL, VLLM_LORA):
            label = "molehill, LoRA" if engine == MOLEHILL else engine
            contestants.append(Contestant(f"{label} r {rank}", engine, (lora,), static))
            if many > 1:
                name = f"{label} r {rank}, {many} of them"
                contestants.append(Contestant(name, engine, (lora,) * many, static))
    return contestants


def rank_of(adapter: Any) -> int:
    """The most rank rows that one projection of an adapter has, as vLLM's LoRA can have them.

    Raises ValueError for more than those.
    """
    stacks = [pair for mixture in adapter.sites.values() for pair in _experts(mixture)]
    rank = max((sum(pair.ranks) for pair in stacks), default=VLLM_RANKS[0])
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    if not fitting:
        raise ValueError(f"--vs-vllm: found rank {rank}, expected at most {VLLM_RANKS[-1]}")
    return fitting[0]


def _experts(mixture: Any) -> list[Any]:
    experts = getattr(mixture, "experts", None)
    return list(experts.values()) if isinstance(experts, Mapping) else [experts] if experts else []


def memory(contestants: Sequence[Contestant], engine: str, itemsize: int) -> int:
    """Bytes that an engine needs for all its adapters at once, with a quarter to spare."""
    total = 0.0
    for contestant in contestants:
        if contestant.engine == engine and contestant.work is not None:
            numbers = contestant.work.routed + contestant.work.static
            total += len(contestant.paths) * (4 * contestant.work.routers + itemsize * numbers)
    return int(1.25 * total) + (256 << 20)


def dtype_of(name: str) -> torch.dtype:
    """Of vLLM's name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
