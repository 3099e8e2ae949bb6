"""What an adapter did in the workers, summed over them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """What one adapter did, over all workers and sites.

    entropy: summed over decisions, each in [0, 1]. expert_tokens: decisions by expert index.
    """

    tokens: int = 0
    decisions: int = 0
    soft: int = 0
    entropy: float = 0.0
    bytes: int = 0
    expert_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Figures") -> None:
        self.tokens += other.tokens
        self.decisions += other.decisions
        self.soft += other.soft
        self.entropy += other.entropy
        self.bytes += other.bytes
        self.expert_tokens.update(other.expert_tokens)


def figures(workers: Iterable[Mapping[Any, Mapping[str, Any]]], lora_int_id: int) -> Figures:
    """Sums up one adapter's counters. Each worker's answer: counters and bytes by lora_int_id.

    Tensor-parallel workers see the same tokens at the same sites, pipeline stages at their own:
    every site counts once. Memory adds up.
    """
    total = Figures()
    sites: dict[str, Mapping[str, Any]] = {}
    for answer in workers:
        counters = answer.get(lora_int_id)
        if counters is None:
            continue
        total.tokens = max(total.tokens, counters["tokens"])
        total.bytes += counters["bytes"]
        sites.update(counters["sites"])
    for site in sites.values():
        total.decisions += site["decisions"]
        total.soft += site["soft"]
        total.entropy += site["entropy"]
        total.expert_tokens.update(dict(enumerate(site["expert_tokens"])))
    return total
