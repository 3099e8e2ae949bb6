"""Base models of many architectures, each with adapters of several methods in one mixed batch.

The oracle is Transformers with tests/mixtures.py inside it, and PEFT for plain LoRA.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mixtures
import pytest
import tiny_models
import torch
from asking import ask, assert_golden
from engines import engine
from golden import VOCABULARY, Prompt
from oracle import answer, peft_lora
from torch import nn

STEPS = 8
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """linears: what DynMoLE and PEFT adapt. attention: what MixLoRA adapts beside the FFN, which
    it can have only where each layer has one gated FFN. act_fn: as the file names it, if it does.
    parameters: what PEFT adapts beside the linears. prompts: a seed whose greedy tokens are sure.
    """

    linears: Sequence[str] = (*QKVO, *FFN)
    attention: str | None = "q_proj"
    act_fn: str | None = None
    parameters: Sequence[str] = ()
    prompts: int = 3


ARCHITECTURES = {
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(act_fn="gelu_pytorch_tanh"),
    "phi3": Architecture(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "qkv_proj", prompts=4
    ),
    "phi": Architecture(("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), None),
    "mixtral": Architecture(
        QKVO, None, parameters=("experts.gate_up_proj", "experts.down_proj"), prompts=4
    ),
}


@dataclass
class Served:
    """An engine, the adapters' requests by name, and what the oracle says of every prompt."""

    llm: Any
    requests: dict[str, Any]
    prompts: list[Prompt] = field(default_factory=list)


def ids_of_prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 12, 33)]


def make(model_type: str, directory: Path) -> tuple[Path, dict[str, Path], list[Prompt]]:
    """The model, its adapters by name, and the oracle's answers."""
    architecture = ARCHITECTURES[model_type]
    path = tiny_models.build(model_type, directory)
    model = tiny_models.load(path)
    recipes = {"dynmole": mixtures.dynmole(model, architecture.linears, seed=5)}
    if architecture.attention:
        recipes["mixlora"] = mixtures.mixlora(
            model, architecture.attention, seed=6, act_fn=architecture.act_fn
        )
    adapters = {name: recipe.save(directory / name) for name, recipe in recipes.items()}
    prompts = []

    def ask_oracle(name: str, attached: AbstractContextManager[nn.Module]) -> None:
        with attached as oracle:
            prompts.extend(
                answer(oracle, name, ids, STEPS) for ids in ids_of_prompts(architecture.prompts)
            )

    ask_oracle("base", nullcontext(model))
    for name, recipe in recipes.items():
        ask_oracle(name, recipe.attached(model))
    adapters["lora"] = directory / "lora"
    wrapped = peft_lora(model, architecture.linears, architecture.parameters, adapters["lora"])
    ask_oracle("lora", nullcontext(wrapped))
    return path, adapters, prompts


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: Any, tmp_path_factory: Any) -> Iterator[Served]:
    from vllm.lora.request import LoRARequest

    directory = tmp_path_factory.mktemp(request.param)
    path, adapters, prompts = make(request.param, directory)
    with engine(model=str(path), enforce_eager=True) as llm:
        requests: dict[str, Any] = {"base": None}
        for i, (name, adapter) in enumerate(adapters.items()):
            requests[name] = LoRARequest(name, i + 1, str(adapter))
            llm.llm_engine.add_lora(requests[name])
        yield Served(llm, requests, prompts)


def test_base_and_adapters_in_one_batch_match_the_oracle(served: Served) -> None:
    mixed = sorted(served.prompts, key=lambda prompt: len(prompt.ids))
    assert_golden(ask(served.llm, mixed, STEPS, requests=served.requests), mixed)


def test_every_adapter_changes_the_answer(served: Served) -> None:
    """Otherwise the comparison above would compare the base with itself."""
    base = {p.ids: p.logits for p in served.prompts if p.case == "base"}
    for prompt in served.prompts:
        if prompt.case != "base":
            assert (prompt.logits - base[prompt.ids]).abs().max() > 0.5
