"""Models of many architectures with adapters of several methods, and what the oracle answers.

The oracle is Transformers with tests/support/mixtures.py inside it, and PEFT for plain LoRA.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support import expert_lora, mixtures, tiny_models, vocabulary
from support.golden import VOCABULARY, Prompt
from support.oracle import answer, peft_lora

STEPS = 8
# Room for tokens that adapters of support.vocabulary.GROWN add, and for more.
EXTRA_VOCAB = vocabulary.ADDED + 3
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """linears: what PEFT adapts, and DynMoLE where its trainer knows the architecture. attention:
    what MixLoRA adapts beside the FFN, which it can have only where each layer has one gated FFN.
    act_fn: as the file names it, if it does. parameters: what PEFT adapts beside the linears. bias:
    which biases of the base PEFT trains in one more adapter; none without it. prompts: a seed whose
    greedy tokens are sure. on_vocabulary: adapters of support.vocabulary that it is asked with.
    """

    linears: Sequence[str] = (*QKVO, *FFN)
    attention: str | None = "q_proj"
    act_fn: str | None = None
    parameters: Sequence[str] = ()
    bias: str | None = None
    dynmole: bool = True
    prompts: int = 3
    on_vocabulary: Sequence[str] = ()


ARCHITECTURES = {
    "mistral": Architecture(),
    "qwen2": Architecture(
        bias="all",
        on_vocabulary=(*vocabulary.names(tied=True), "grown-saved", "grown-tokens"),
    ),
    "qwen3": Architecture(
        on_vocabulary=(*vocabulary.names(tied=False), "grown", "grown-both"),
    ),
    "gemma2": Architecture(act_fn="gelu_pytorch_tanh", on_vocabulary=("on-both", "grown-saved")),
    "phi3": Architecture(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "qkv_proj", prompts=4
    ),
    "phi": Architecture(
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        None,
        bias="lora_only",
        on_vocabulary=("on-head",),
    ),
    "gpt_oss": Architecture(
        QKVO,
        None,
        parameters=("experts.gate_up_proj", "experts.down_proj", "router.weight"),
        on_vocabulary=("on-both",),
    ),
    "gpt2": Architecture(("c_attn", "c_proj", "c_fc"), None, bias="lora_only", dynmole=False),
    "mixtral": Architecture(
        QKVO, None, parameters=("experts.gate_up_proj", "experts.down_proj"), prompts=4
    ),
}


def ids_of_prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 12, 33)]


def make(model_type: str, directory: Path) -> tuple[Path, dict[str, Path], list[Prompt]]:
    """The model, its adapters by name, and the oracle's answers."""
    architecture = ARCHITECTURES[model_type]
    path = tiny_models.build(model_type, directory)
    model = tiny_models.load(path)
    recipes: dict[str, Any] = {}
    if architecture.dynmole:
        recipes["dynmole"] = mixtures.dynmole(model, architecture.linears, seed=5)
    if architecture.attention:
        recipes["mixlora"] = mixtures.mixlora(
            model, architecture.attention, seed=6, act_fn=architecture.act_fn
        )
    if model_type == "mixtral":
        recipes["experts"] = expert_lora.mixtral(model, seed=7)
    adapters = {name: recipe.save(directory / name) for name, recipe in recipes.items()}
    prompts = []

    def ask_oracle(name: str, attached: AbstractContextManager[nn.Module]) -> None:
        with attached as oracle:
            prompts.extend(answer(oracle, name, ids, STEPS) for ids in prompts_of(name))

    def prompts_of(name: str) -> list[list[int]]:
        """Of an adapter that adds tokens, with these."""
        added = [VOCABULARY + 1, VOCABULARY] if name in vocabulary.GROWN else []
        return [[*ids[:3], *added, *ids[3:]] for ids in ids_of_prompts(architecture.prompts)]

    ask_oracle("base", nullcontext(model))
    for name, recipe in recipes.items():
        ask_oracle(name, recipe.attached(model))
    for name in architecture.on_vocabulary:
        adapters[name] = directory / name
        ask_oracle(name, nullcontext(vocabulary.author(path, adapters[name], name)))
    if architecture.bias:
        adapters["biases"] = directory / "biases"
        linears = architecture.linears[:1] + architecture.linears[3:]
        source = copy.deepcopy(model)
        biased = peft_lora(source, linears, (), adapters["biases"], architecture.bias)
        ask_oracle("biases", nullcontext(biased))
    adapters["lora"] = directory / "lora"
    wrapped = peft_lora(model, architecture.linears, architecture.parameters, adapters["lora"])
    ask_oracle("lora", nullcontext(wrapped))
    return path, adapters, prompts
