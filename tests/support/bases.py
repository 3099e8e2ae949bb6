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
    """linears: what PEFT adapts. dynmole: linears with a mixture in one more adapter. mixlora: the
    linear of attention with a LoRA beside a mixture of each FFN, in one more; act_fn: of the FFNs,
    where its file has to name it. prompts: a seed whose greedy tokens are sure. refused: a pattern
    of what is said of LoRA on every linear, where that is more than `linears`. options: of vLLM's
    `LLM`.
    """

    linears: Sequence[str] | str = ALL_LINEAR
    dynmole: Sequence[str] = ()
    mixlora: str = ""
    act_fn: str | None = None
    prompts: int = 3
    refused: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


OF_LLAMA: Mapping[str, Any] = {"dynmole": ("q_proj", "up_proj", "down_proj"), "mixlora": "q_proj"}
OF_GEMMA: Mapping[str, Any] = {**OF_LLAMA, "act_fn": "gelu_pytorch_tanh"}
# Without a gated FFN, which MixLoRA needs.
WITHOUT_GATE = ("q_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "o_proj")
OF_DEEPSEEK: Mapping[str, Any] = {
    "linears": (
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    "dynmole": ("q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
    "prompts": 4,
    "refused": r"self_attn\.kv_b_proj: found a linear that vLLM multiplies into the queries",
    "options": {"block_size": 16},
}
BASES: Mapping[str, Base] = {
    "gemma3_text": Base(**OF_GEMMA),
    "gemma4_text": Base(**OF_GEMMA),
    "ministral3": Base(**OF_LLAMA),
    "granite": Base(**OF_LLAMA),
    "olmo3": Base(**OF_LLAMA),
    "smollm3": Base(**OF_LLAMA),
    "cohere2": Base(**OF_LLAMA),
    "exaone4": Base(**OF_LLAMA),
    "seed_oss": Base(**OF_LLAMA),
    "apertus": Base(dynmole=WITHOUT_GATE, prompts=4),
    "starcoder2": Base(dynmole=("q_proj", "c_fc", "c_proj")),
    "nemotron": Base(dynmole=WITHOUT_GATE),
    "glm4": Base(dynmole=("q_proj", "gate_up_proj", "down_proj"), mixlora="q_proj", prompts=4),
    "phi3": Base(dynmole=("qkv_proj", "gate_up_proj", "down_proj"), prompts=4),
    "gemma4_key_as_value": Base(dynmole=("k_proj",)),
    "gemma4_per_layer_inputs": Base(dynmole=("per_layer_input_gate",)),
    "qwen3_moe": Base(dynmole=ATTENTION),
    "qwen2_moe": Base(dynmole=ATTENTION),
    "mixtral": Base(),
    "granitemoe": Base(dynmole=ATTENTION),
    "granitemoeshared": Base(dynmole=ATTENTION),
    "granitemoehybrid": Base(dynmole=("in_proj", "out_proj", "q_proj", "input_linear")),
    "falcon_h1": Base(
        linears=("in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"),
        dynmole=("in_proj", "q_proj", "gate_proj"),
    ),
    "nemotron_h": Base(
        linears=("in_proj", "q_proj", "k_proj", "v_proj", "o_proj"), dynmole=("in_proj", "q_proj")
    ),
    "lfm2": Base(dynmole=("in_proj", "q_proj", "out_proj", "w1", "w2")),
    "lfm2_moe": Base(dynmole=("in_proj", "q_proj", "out_proj")),
    "deepseek_v3": Base(**OF_DEEPSEEK),
    "deepseek_v3_yarn": Base(**OF_DEEPSEEK),
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
    recipes = {}
    if base.dynmole:
        recipes["dynmole"] = mixtures.dynmole(model, base.dynmole, seed=5)
    if base.mixlora:
        recipes["mixlora"] = mixtures.mixlora(model, base.mixlora, seed=6, act_fn=base.act_fn)
    adapters = {method: directory / f"{name}-{method}" for method in (*recipes, "lora")}
    for method, recipe in recipes.items():
        recipe.save(adapters[method])
        with recipe.attached(model):
            prompts += [answer(model, method, token_ids, STEPS) for token_ids in ids]
    adapted = peft_lora(model, base.linears, (), adapters["lora"])
    prompts += [answer(adapted, "lora", token_ids, STEPS) for token_ids in ids]
    if base.refused:
        adapters["refused"] = directory / f"{name}-refused"
        peft_lora(tiny_models.load(path), ALL_LINEAR, (), adapters["refused"])
    prompts.sort(key=lambda prompt: len(prompt.ids))
    return Job(path, adapters, prompts, STEPS, dict(base.options))
