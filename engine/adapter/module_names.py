"""One name for a base model's module, whatever stands around its decoder layers.

Transformers, vLLM and trainers disagree on what precedes `layers.3.self_attn.q_proj`: `model.` in a
text model, `model.language_model.` or `language_model.model.` in a multimodal one, `transformer.`
before the `h.3` of GPT-2.
"""

import re

from molehill.engine.adapter import expert_sites

AROUND_LAYERS = r"(?:(?:model|language_model|transformer)\.)*"
# Linears outside the layers that adapters change: Gemma 3n's and Gemma 4's.
OUTSIDE_LAYERS = ("per_layer_model_projection",)
LAYER = r"(?:layers|h)\.(?:0|[1-9]\d{0,4})\."

_AROUND = re.compile(AROUND_LAYERS)
_LAYER = re.compile(r"(?P<layers>layers|h)\.(?P<number>0|[1-9]\d{0,4})\.(?P<path>.+)")


def canonical(module: str) -> str:
    """`layers.3.mlp.experts.5.up_proj` of `model.layers.3.block_sparse_moe.experts.5.w3`."""
    return expert_sites.canonical(without_surroundings(module))


def without_surroundings(module: str) -> str:
    """`layers.3.mlp.up_proj` of `model.language_model.layers.3.mlp.up_proj`."""
    return _AROUND.sub("", module, count=1)


def split_layer(module: str) -> tuple[int, str] | None:
    """`layers.3.mlp.up_proj` to (3, `mlp.up_proj`); None for a module outside the layers."""
    match = _LAYER.fullmatch(module)
    return (int(match["number"]), match["path"]) if match else None
