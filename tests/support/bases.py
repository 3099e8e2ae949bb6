"""Tiny bases of many architectures, each with PEFT's LoRA on every linear, and what Transformers
and PEFT answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import mixtures, tiny_models
from support.architectures import ids_of_prompts
from support.in_process import Job
from support.oracle import answer, peft_lora

STEPS = 8
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Base:
    """linears: what PEFT adapts; none where the base itself has no oracle on CPU. dynmole: linears
    with a mixture in one more adapter. prompts: a seed whose greedy tokens are sure. refused: a
    pattern of what is said of LoRA on every linear, where that is more than `linears`. options: of
    vLLM's `LLM`.
    """

    linears: Sequence[str] | str = ALL_LINEAR
    dynmole: Sequence[str] = ()
    prompts: int = 3
    refused: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


BASES: Mapping[str, Base] = {
    "gemma3_text": Base(),
    "gemma4_text": Base(),
    "ministral3": Base(),
    "granite": Base(),
    "olmo3": Base(),
    "smollm3": Base(),
    "cohere2": Base(),
    "exaone4": Base(),
    "seed_oss": Base(),
    "apertus": Base(prompts=4),
    "starcoder2": Base(),
    "nemotron": Base(),
    "glm4": Base(dynmole=("q_proj", "gate_up_proj", "down_proj"), prompts=4),
    "phi3": Base(dynmole=("qkv_proj", "gate_up_proj", "down_proj"), prompts=4),
    "gemma4_key_as_value": Base(dynmole=("k_proj",)),
    "gemma4_per_layer_inputs": Base(dynmole=("per_layer_input_gate",)),
    "qwen3_moe": Base(),
    "qwen2_moe": Base(),
    "mixtral": Base(),
    "granitemoe": Base(),
    "granitemoeshared": Base(),
    "granitemoehybrid": Base(),
    "falcon_h1": Base(linears=("in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")),
    "nemotron_h": Base(linears=("in_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
    # vLLM's MLA on CPU answers otherwise than Transformers here.
    "deepseek_v3": Base(
        linears=(),
        refused=r"self_attn\.kv_b_proj: found a linear that vLLM multiplies into the queries",
        options={"block_size": 16},
    ),
    "falcon": Base(
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), prompts=4
    ),
}


def make(name: str, directory: Path) -> Job:
    """The base, its adapters and the oracle's answers, to be asked in one batch."""
    base = BASES[name]
    path = tiny_models.build(name, directory)
    model = tiny_models.load(path)
    ids = ids_of_prompts(base.prompts)
    prompts = [answer(model, "base", token_ids, STEPS) for token_ids in ids]
    adapters = {}
    if base.dynmole:
        recipe = mixtures.dynmole(model, base.dynmole, seed=5)
        adapters["dynmole"] = recipe.save(directory / f"{name}-dynmole")
        with recipe.attached(model):
            prompts += [answer(model, "dynmole", token_ids, STEPS) for token_ids in ids]
    if base.linears:
        adapters["lora"] = directory / f"{name}-lora"
        adapted = peft_lora(model, base.linears, (), adapters["lora"])
        prompts += [answer(adapted, "lora", token_ids, STEPS) for token_ids in ids]
    if base.refused:
        adapters["refused"] = directory / f"{name}-refused"
        peft_lora(tiny_models.load(path), ALL_LINEAR, (), adapters["refused"])
    prompts.sort(key=lambda prompt: len(prompt.ids))
    return Job(path, adapters, prompts, STEPS, dict(base.options))
