"""The shapes of a base model from its Transformers config, without loading weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from molehill.engine.base import BaseModel

_FFN_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


def base_model(source: str | Path | PretrainedConfig) -> BaseModel:
    """From a model directory, a name in the local cache, or a config.

    Its linears are those inside the layers; the head and the embeddings are never adapted.
    """
    config = source if isinstance(source, PretrainedConfig) else AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return BaseModel(
        name=str(source if isinstance(source, str | Path) else config.name_or_path),
        architecture=(config.architectures or [type(model).__name__])[0],
        linears=_linears(model),
        ffns=_ffns(model, _activation(config)),
    )


def canonical_name(module: str) -> str:
    """A module's name in the adapter's terms: without the leading `model.`."""
    return module.removeprefix("model.")


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        canonical_name(name): (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


def _ffns(model: nn.Module, activation: str) -> dict[str, str]:
    return {
        canonical_name(name): activation
        for name, module in model.named_modules()
        if {child for child, m in module.named_children() if isinstance(m, nn.Linear)}
        >= _FFN_PROJECTIONS
    }


def _activation(config: Any) -> str:
    text = config.get_text_config()
    name = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    return str(name)
