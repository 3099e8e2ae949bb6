"""Activated adapters: PEFT's golden LoRA, and other golden cases with an invocation."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.golden import VOCABULARY, Case, Prompt

FIELD = "alora_invocation_tokens"
INVOCATION = [301, 17, 302]
# Of the mixture; it begins as the other one ends.
OTHER = [302, 9]
# Of the tiny Llama.
HIDDEN = 64


def golden_prompts() -> list[Prompt]:
    """Those that activate PEFT's LoRA, with what PEFT answered."""
    case = Case("alora")
    return [
        Prompt(
            case.name,
            tuple(prompt["prompt_token_ids"]),
            tuple(prompt["greedy_token_ids"]),
            case.tensors[f"logits.{i}"][-1],
        )
        for i, prompt in enumerate(case.oracle["prompts"])
        if prompt["invocation_start"] is not None
    ]


def activate(case: str, directory: Path, tokens: Sequence[int], **config: object) -> Path:
    """A copy of a golden case that such tokens activate. config: fields that differ besides."""
    directory.mkdir()
    for file in Case(case).path.glob("adapter_model.*"):
        (directory / file.name).symlink_to(file)
    fields = json.loads((Case(case).path / "adapter_config.json").read_text())
    document = {**fields, **config, FIELD: list(tokens)}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def activate_head(directory: Path, tokens: Sequence[int]) -> Path:
    """PEFT's golden LoRA with a pair on the LM head too, which such tokens activate."""
    case = Case("alora")
    fields = json.loads((case.path / "adapter_config.json").read_text())
    (weights,) = case.path.glob("adapter_model.safetensors")
    generator = torch.Generator().manual_seed(4)
    rank, stem = fields["r"], "base_model.model.lm_head"
    pair = {
        f"{stem}.lora_A.weight": torch.randn(rank, HIDDEN, generator=generator) * 0.2,
        f"{stem}.lora_B.weight": torch.randn(VOCABULARY, rank, generator=generator) * 0.2,
    }
    directory.mkdir()
    save_file({**load_file(weights), **pair}, directory / "adapter_model.safetensors")
    targets = [*fields["target_modules"], "lm_head"]
    document = {**fields, "target_modules": targets, FIELD: list(tokens)}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory
