"""Activated adapters: PEFT's golden LoRA, and other golden cases with an invocation."""

import json
from collections.abc import Sequence
from pathlib import Path

from support.golden import Case, Prompt

FIELD = "alora_invocation_tokens"
INVOCATION = [301, 17, 302]
# Of the mixture; it begins as the other one ends.
OTHER = [302, 9]


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
