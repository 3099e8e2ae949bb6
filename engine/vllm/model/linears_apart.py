"""Linears of a loaded vLLM model that adapters cannot change, or that the model does not have."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import supports_multimodal

from molehill.engine.adapter import modalities
from molehill.engine.vllm.model.discovery import Linear
from molehill.engine.vllm.model.projections import canonical

ABSORBED = "a linear that vLLM multiplies into the queries and the output as it decodes (MLA)"
REPLICATED = "a mixer's groups that are on several ranks (tensor parallelism)"


def of_text(model: nn.Module, linears: Sequence[Linear]) -> list[Linear]:
    """Those whose rows are tokens of requests."""
    others = {id(module) for part in _other_modalities(model).values() for module in part.modules()}
    return [linear for linear in linears if id(linear.module) not in others]


def _other_modalities(model: Any) -> dict[str, nn.Module]:
    """By canonical name; none where vLLM does not say which part is the language model."""
    if not supports_multimodal(model):
        return {}
    try:
        text = model.get_language_model()
    except NotImplementedError:
        return {}
    return {
        canonical(name): part
        for name, part in modalities.apart(model, text)
        if not any(isinstance(module, VocabParallelEmbedding) for module in part.modules())
    }


def refused(model: nn.Module, linears: Sequence[Linear]) -> dict[str, str]:
    """Why a linear that the original has cannot be adapted, by its site, or by a part of the model
    that has it."""
    by_module = {id(linear.module): linear for linear in linears}
    reasons = dict.fromkeys(_other_modalities(model), modalities.REFUSAL)
    for module in model.modules():
        if isinstance(module, MLAAttention) and id(module.kv_b_proj) in by_module:
            reasons[by_module[id(module.kv_b_proj)].name] = ABSORBED
        if isinstance(module, MambaMixer2) and id(module.in_proj) in by_module:
            # vLLM's own loader repeats rows of B and C: mamba_v2_sharded_weight_loader.
            merged = isinstance(module.in_proj, MergedColumnParallelLinear)
            if module.tp_size > 1 and not merged:
                reasons[by_module[id(module.in_proj)].name] = REPLICATED
    return reasons


def ignored(model: nn.Module) -> frozenset[str]:
    """k and v of layers that take them from another layer's KV cache (Gemma 4), which checkpoints
    and adapters may hold although no model computes them."""
    return frozenset(_without_own_keys(model))


def _without_own_keys(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if getattr(module, "is_kv_shared_layer", False):
            children = dict(module.named_children())
            if "qkv_proj" not in children:
                for leaf in ("k_proj", "v_proj"):
                    if leaf not in children:
                        yield canonical(f"{name}.{leaf}")
