"""The shapes of a base model from its Transformers config, without loading weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from molehill.engine.adapter import modalities, module_names
from molehill.engine.adapter.base_model import BaseModel, Moe
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head
from molehill.engine.system.torchvision import check_importable
from molehill.kernels.activation import SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT

_IN_LAYERS = re.compile(r"(?:^|\.)(?:layers|h)\.\d+\.")
_FFN_PROJECTIONS = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def base_model(source: str | Path | PretrainedConfig) -> BaseModel:
    """From a model directory, a name in the local cache, or a config.

    Its linears are those inside the layers, and module_names.OUTSIDE_LAYERS. Raises OSError or
    ValueError as Transformers does, and ImportError where it lacks something.
    """
    check_importable()
    config = source if isinstance(source, PretrainedConfig) else AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = _empty(config)
    others = _other_modalities(model)
    return BaseModel(
        name=str(source if isinstance(source, str | Path) else config.name_or_path),
        architecture=(config.architectures or [type(model).__name__])[0],
        linears={site: shape for site, shape in _linears(model).items() if not _in(site, others)},
        ffns=_ffns(model, activation(config)),
        moes=_moes(model),
        vocabulary=_vocabulary(model),
        tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
        refused={**_refused(model), **dict.fromkeys(others, modalities.REFUSAL)},
        biased=frozenset(site for site in _biased(model) if not _in(site, others)),
        ignored=_ignored(model),
    )


def _empty(config: Any) -> Any:
    """The model, on the device that is set; some multimodal ones are no causal LMs by name."""
    named = type(config) in AutoModelForCausalLM._model_mapping
    is_multimodal = not named and type(config) in AutoModelForImageTextToText._model_mapping
    factory = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    return factory.from_config(config)


def _other_modalities(model: Any) -> set[str]:
    """Names of the parts of a multimodal model that read no tokens."""
    text = model.get_decoder()
    if text is None or model.config.get_text_config() is model.config:
        return set()
    names = (canonical_name(name) for name, _ in modalities.apart(model, text))
    return {name for name in names if not is_head(name)}


def _in(site: str, parts: set[str]) -> bool:
    return any(site.startswith(f"{part}.") for part in parts)


def canonical_name(module: str) -> str:
    """A module's name in the adapter's terms: without what precedes the decoder layers."""
    return module_names.canonical(module)


def activation(config: Any) -> str:
    """The Transformers name of a causal LM's FFN activation."""
    text = config.get_text_config()
    name = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    return str(name)


def fused_experts(module: nn.Module) -> Moe | None:
    """The sizes of a module that holds a block's experts in two parameters, `gate_up_proj`
    `[E, 2 I, d]`, all gates before all ups, and `down_proj` `[E, d, I]`, or as gpt-oss has it:
    `[E, d, 2 I]`, gates and ups in turn, `[E, I, d]`, and biases; None for any other."""
    parameters = dict(module.named_parameters(recurse=False))
    if _is_of_gpt_oss(module, parameters):
        experts, intermediate, hidden = parameters["down_proj"].shape
        return Moe(experts, hidden, intermediate, interleaved=True)
    if set(parameters) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        return None
    if not getattr(module, "is_concatenated", True) or parameters["down_proj"].ndim != 3:
        return None
    experts, hidden, intermediate = parameters["down_proj"].shape
    if tuple(parameters["gate_up_proj"].shape) != (experts, 2 * intermediate, hidden):
        return None
    return Moe(experts, hidden, intermediate)


def _is_of_gpt_oss(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    names = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    if set(parameters) != names or parameters["down_proj"].ndim != 3:
        return False
    experts, intermediate, hidden = parameters["down_proj"].shape
    return (
        getattr(module, "is_transposed", False)
        and not getattr(module, "is_concatenated", True)
        and tuple(parameters["gate_up_proj"].shape) == (experts, hidden, 2 * intermediate)
        and _swiglu_constants(module) == (SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT)
    )


def _swiglu_constants(module: nn.Module) -> tuple[float | None, float | None]:
    """vLLM computes with its own, whatever a config says."""
    return getattr(module, "alpha", None), getattr(module, "limit", None)


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        canonical_name(name): shape
        for name, module in model.named_modules()
        if _is_adaptable(name) and (shape := _linear(module)) is not None
    }


def _is_adaptable(name: str) -> bool:
    inside = _IN_LAYERS.search(name) is not None
    return inside or canonical_name(name) in module_names.OUTSIDE_LAYERS


def _ignored(model: nn.Module) -> frozenset[str]:
    return frozenset(
        canonical_name(f"{name}.{leaf}")
        for name, module in model.named_modules()
        if getattr(module, "is_kv_shared_layer", False)
        for leaf in ("k_proj", "v_proj")
        if not hasattr(module, leaf)
    )


def _vocabulary(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of the embedding, taken as a linear from token ids, and of the LM head."""
    shapes = {}
    for name, module in model.named_modules():
        site = canonical_name(name)
        if is_embedding(site) and isinstance(module, nn.Embedding):
            shapes[site] = (module.num_embeddings, module.embedding_dim)
        if is_head(site) and isinstance(module, nn.Linear):
            shapes[site] = (module.in_features, module.out_features)
    return shapes


def _biased(model: nn.Module) -> frozenset[str]:
    return frozenset(
        canonical_name(name)
        for name, module in model.named_modules()
        if _is_adaptable(name)
        and _linear(module) is not None
        and getattr(module, "bias", None) is not None
    )


def _linear(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear, and of the router of a block of experts."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if is_router(module):
        outputs, inputs = module.get_parameter("weight").shape
        return inputs, outputs
    return None


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router of Transformers' own, `weight` `[E, in]`, whose forward also
    chooses the experts."""
    if not type(module).__name__.endswith("Router"):
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 2


def _ffns(model: nn.Module, activation: str) -> dict[str, str]:
    return {
        canonical_name(name): activation
        for name, module in model.named_modules()
        if _is_gated_ffn({n: m for n, m in module.named_children() if isinstance(m, nn.Linear)})
    }


def _is_gated_ffn(linears: dict[str, nn.Linear]) -> bool:
    if not any(projections <= set(linears) for projections in _FFN_PROJECTIONS):
        return False
    fused = linears.get("gate_up_proj")
    return fused is None or fused.out_features == 2 * linears["down_proj"].in_features


def _moes(model: nn.Module) -> dict[str, Moe]:
    return {
        canonical_name(name).removesuffix(".experts"): block
        for name, module in model.named_modules()
        if name.endswith(".experts") and (block := fused_experts(module)) is not None
    }


def _refused(model: nn.Module) -> dict[str, str]:
    """Blocks whose experts are in parameters of another layout than `fused_experts` knows."""
    refused = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if "gate_up_proj" in parameters and fused_experts(module) is None:
            traits = {
                "weights as [in, out]": getattr(module, "is_transposed", False),
                "gate and up interleaved": not getattr(module, "is_concatenated", True),
                "biases": any(name.endswith("_bias") for name in parameters),
                f"swiglu_alpha and swiglu_limit other than {SWIGLUOAI_ALPHA} and "
                f"{SWIGLUOAI_LIMIT}": _swiglu_constants(module)
                not in ((None, None), (SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT)),
            }
            said = " and ".join(trait for trait, has in traits.items() if has) or "another layout"
            refused[canonical_name(name)] = f"experts that the base holds with {said}"
    return refused
