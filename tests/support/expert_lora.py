"""LoRA of unequal ranks on a Mixtral's experts: PEFT's files, with the names of Transformers 4, and
a Transformers model with the products merged into its weights. Nothing here uses molehill.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANKS, ALPHA = (2, 5, 1, 3), 6


@dataclass
class ExpertLora:
    """tensors: the file's. deltas: by the model's fused parameter, what is added to it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": ALPHA,
            "target_modules": ["w1", "w2", "w3"],
            "rank_pattern": self.ranks,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        torch.save(self.tensors, directory / "adapter_model.bin")
        return directory

    @contextmanager
    @torch.no_grad()
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the deltas in its weights, inside the block."""
        before = {name: model.get_parameter(name).clone() for name in self.deltas}
        for name, delta in self.deltas.items():
            model.get_parameter(name).add_(delta)
        try:
            yield model
        finally:
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)


def mixtral(model: Any, seed: int) -> ExpertLora:
    """Seeded pairs on w1, w2 and w3 of every expert, strong enough to change greedy tokens."""
    generator, made = torch.Generator().manual_seed(seed), ExpertLora()
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        stem = f"model.layers.{i}.mlp.experts"
        gate_up, down = (
            torch.zeros_like(experts.get_parameter(n)) for n in ("gate_up_proj", "down_proj")
        )
        for e in range(len(down)):
            gate, up = gate_up[e].chunk(2)
            for j, (name, target) in enumerate((("w1", gate), ("w3", up), ("w2", down[e]))):
                rank = RANKS[(e + i + j) % len(RANKS)]
                out, inputs = target.shape
                a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
                b = torch.randn(out, rank, generator=generator) * 0.3
                target.add_(ALPHA / rank * b @ a)
                site = f"layers.{i}.block_sparse_moe.experts.{e}.{name}"
                made.ranks[site] = rank
                made.tensors[f"base_model.model.model.{site}.lora_A.weight"] = a
                made.tensors[f"base_model.model.model.{site}.lora_B.weight"] = b
        made.deltas |= {f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}
    return made
