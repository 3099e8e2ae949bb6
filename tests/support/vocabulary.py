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
# Rows in the place of the base's.
ROWS: Mapping[str, Mapping[str, Any]] = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [351, 5, 299]},
    "tokens-apart": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 135], "lm_head": [511, 5]},
    },
    "saved": {"target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}
# The rows of whole modules that are changed; of one that is not here, all of them.
CHANGED = {"saved": slice(3, 40), "grown-saved": slice(500, None)}
# With two tokens added to the vocabulary.
GROWN: Mapping[str, Mapping[str, Any]] = {
    "grown": {"target_modules": ["q_proj"]},
    "grown-saved": {
        "target_modules": ["down_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "grown-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 513, 512]},
    "grown-both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}
ADDED = 2
# Those that need a base whose embedding and head are one weight.
TIED: Mapping[str, Mapping[str, Any]] = {
    "tying": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
}

# That leave no doubt about greedy tokens, where it is not 0.
SEEDS: Mapping[tuple[str, str], int] = {("qwen2", "tokens-apart"): 1}
HEADS = ("on-head", "on-both", "tying", *ROWS, *GROWN)


def author(base: Path, directory: Path, name: str, seed: int | None = None) -> nn.Module:
    """Saves a random adapter of one of these names; the model that answers with it."""
    settings = {**LORAS, **TIED, **ROWS, **GROWN}[name]
    if seed is None:
        seed = SEEDS.get((tiny_models.model_type(base), name), 0)
    added = ADDED if name in GROWN else 0
    return save(base, directory, settings, seed, CHANGED.get(name, slice(None)), added)


def save(
    base: Path,
    directory: Path,
    settings: Mapping[str, Any],
    seed: int = 0,
    rows: slice = slice(None),
    added: int = 0,
) -> nn.Module:
    """The same with these settings. rows: of whole modules, that are changed. added: tokens."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(seed)
    source = tiny_models.load(base)
    if added:
        _grow(source, added, seed)
    model = peft.get_peft_model(source, config)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_" in name:
            parameter.data.copy_((0.4 if "embedding" in name else 0.25) * noise)
        elif "trainable_tokens_delta" in name:
            parameter.data += 0.5 * noise
        elif "modules_to_save" in name:
            parameter.data[rows] += 0.5 * noise[rows]
    model.eval().save_pretrained(directory)
    return model


def _grow(model: Any, added: int, seed: int) -> None:
    """Rows of added tokens that are large enough to be answered now and then."""
    model.resize_token_embeddings(model.config.vocab_size + added)
    generator = torch.Generator().manual_seed(seed)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = module.weight.data[-added:]
        rows.copy_(4 * module.weight.std() * torch.randn(rows.shape, generator=generator))


def names(tied: bool) -> dict[str, Mapping[str, Any]]:
    """The settings that a base takes."""
    return {**LORAS, **ROWS, **(TIED if tied else {})}
