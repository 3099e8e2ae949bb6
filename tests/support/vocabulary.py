"""Adapters that change the vocabulary, by PEFT on a tiny random model, with what PEFT answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support import tiny_models

# By name: the settings of LoraConfig beside rank and alpha.
LORAS: Mapping[str, Mapping[str, Any]] = {
    "on-embedding": {"target_modules": ["embed_tokens"]},
    "on-head": {"target_modules": ["lm_head", "q_proj"], "use_rslora": True},
    "on-both": {
        "target_modules": ["embed_tokens", "lm_head", "down_proj"],
        "rank_pattern": {"lm_head": 2},
        "alpha_pattern": {"embed_tokens": 3},
    },
}
# Those that need a base whose embedding and head are one weight.
TIED: Mapping[str, Mapping[str, Any]] = {
    "tying": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
}

HEADS = ("on-head", "on-both", "tying")


def author(base: Path, directory: Path, settings: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Saves a random LoRA; the model that answers with it."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny_models.load(base), config)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name and id(parameter) not in done:
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.4 if "embedding" in name else 0.25
            parameter.data.copy_(scale * noise)
    model.eval().save_pretrained(directory)
    return model


def names(tied: bool) -> dict[str, Mapping[str, Any]]:
    """The settings that a base takes."""
    return {**LORAS, **(TIED if tied else {})}
