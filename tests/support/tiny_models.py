"""Tiny random models of many architectures, as Transformers saves them.

Hidden size 64, two layers, float32, with the golden tokenizer. Weights are large enough that greedy
tokens are well apart.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.base_configs import CONFIGS
from support.golden import TINY_LLAMA, VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# A gated delta net and a full attention: heads of widths that vLLM's CPU kernels take.
DELTA_NET = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
# By `model_type`, or a name that has one: what differs from SIZES. head_dim * heads is not the
# hidden size where it can.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
    },
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": None},
    "phi": {"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "mixtral": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "gpt2": {"num_attention_heads": 2},
    "gpt_oss": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": {
        **DELTA_NET,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    **CONFIGS,
}


def build(name: str, directory: Path) -> Path:
    """Saves a model of MODELS, seeded by its name, and returns its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"model_type": name, **SIZES, **MODELS[name]}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed=sum(map(ord, name)))
    target = directory / name
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / file, target / file)
    return target


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Matrices keep the scale of what they read, norms and biases have noise, logits are wide."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma's norms add 1 to their weights, and its embeddings are scaled by 8.
    has_gemma = model.config.model_type in ("gemma2", "gemma3_text", "gemma3")
    for name, parameter in model.named_parameters():
        gemma = has_gemma and "vision_tower" not in name
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            centre = 0.0 if gemma or name.endswith("bias") else 1.0
            last = name in ("model.norm.weight", "model.language_model.norm.weight")
            centre += 4.0 if gemma and last else 0.0
            parameter.copy_(centre + 0.3 * noise)
        elif "embed" in name:
            parameter.copy_(noise * (0.1 if gemma else 1.0))
        else:
            scale = 4.0 if "lm_head" in name else 1.5
            parameter.copy_(scale * parameter.shape[-1] ** -0.5 * noise)


def load(directory: Path) -> Any:
    """The Transformers model, float32, for comparison."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if ".act_fn.alpha" in name:
            # Apertus's, which vLLM has in bfloat16 whatever the model's dtype is.
            parameter.data = parameter.data.bfloat16()
    return model.eval()


def model_type(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text())["model_type"])
