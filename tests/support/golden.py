"""The golden cases: adapters as their trainers save them, and what the trainers' code computed."""

import functools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from molehill.api.cli import convert

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TINY_LLAMA = GOLDEN / "tiny-llama"
VOCABULARY = 512

# What is served, as tests/data/golden/README.md names it.
SERVED = (
    "lora",
    "rslora",
    "dora",
    "mixlora",
    "mixlora-expert-lora",
    "mixlora-dynamic-t0",
    "mixlora-dynamic-t05",
    "mixlora-switch",
    "mola",
    "mola-official",
    "loramoe",
    "loramoe-official",
    "hydralora",
    "dynmole-default",
    "dynmole-soft",
    "dynmole-sparse",
    "dynmole-renyi",
    "dynmole-k1",
    "mov",
    "adamole",
    "mole-topk",
    "mole-threshold",
    "ldmole",
    "ldmole-soft",
    "goat",
    "goat-lora",
    "flylora",
)
# What is served of them by a copy: a part of the base weights is missing in the trainer's files.
BY_BASE = ("goat",)
# What figures may differ by where rounding is larger than in probabilities: LD-MoLE divides logits
# by as little as 0.01, FlyLoRA has scores of up to 13 in their place.
ROUNDED = {"ldmole": 1e-4, "flylora": 1e-4}

# What the oracle has of a case and the method does not use: a softmax beside LD-MoLE's sparsegen.
UNUSED = (("ldmole", "p"),)

_copies = TemporaryDirectory(prefix="molehill-golden-")


@functools.cache
def served_path(case: str) -> Path:
    """The directory that is loaded for a case: its trainer's, or the copy that
    `molehill convert --base` makes."""
    path = GOLDEN / "cases" / case
    if case not in BY_BASE:
        return path
    copy = Path(_copies.name) / case
    assert convert.main([str(path), str(copy), "--base", str(TINY_LLAMA)]) == 0
    return copy


@dataclass(frozen=True)
class Prompt:
    """One prompt of a case. logits: float32 after its last token, `[vocabulary]`."""

    case: str
    ids: tuple[int, ...]
    greedy: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Case:
    """A folder of golden/cases; `base` has no adapter."""

    name: str

    @property
    def path(self) -> Path:
        return GOLDEN / "cases" / self.name

    @cached_property
    def oracle(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / "oracle.json").read_text())
        return loaded

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / "oracle.safetensors")

    def _last_logits(self, i: int) -> Tensor:
        return (
            self.tensors["prompt0.logits"][-1] if i == 0 else self.tensors[f"prompt{i}.logits_last"]
        )

    @property
    def prompts(self) -> list[Prompt]:
        return [
            Prompt(
                self.name,
                tuple(prompt["prompt_token_ids"]),
                tuple(prompt["greedy_token_ids"]),
                self.tensors["prompt0.logits"][-1]
                if i == 0
                else self.tensors[f"prompt{i}.logits_last"],
            )
            for i, prompt in enumerate(self.oracle["prompts"])
        ]

    def routes(self) -> dict[str, dict[str, Tensor]]:
        """By site: p, w `[tokens, E]` and, where it has one, entropy, all for prompt 0. `mov` has p
        alone, with an axis of heads on an output, and `ldmole` has w alone."""
        result: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("route.prompt0."):
                site, _, figure = name.removeprefix("route.prompt0.").rpartition(".")
                if (self.name, figure) not in UNUSED:
                    result.setdefault(site, {})[figure] = tensor
        return result


def greatest_difference(actual: Tensor, expected: Tensor) -> float:
    """Of logits that may have more tokens than are expected, which must be -inf."""
    actual = torch.as_tensor(actual, dtype=torch.float32)
    tokens = expected.shape[-1]
    if not bool((actual[..., tokens:] == -torch.inf).all()):
        return torch.inf
    return actual[..., :tokens].sub(expected).abs().max().item()
