"""Keys and values that are finite, whatever an adapter's weights make of hidden states.

Weights that are finite may overflow in a layer. Such answers are the adapter's own; but a block of
the KV cache goes on to other requests with what they do not overwrite, and vLLM's attention on CPU
multiplies what lies behind a request's tokens by 0: NaN stays NaN, in answers of the base too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention.attention import Attention

_PLACES = {"key": 1, "value": 2}


def keep_finite(model: nn.Module) -> None:
    """From here on no attention layer of the model caches an infinite number or none."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(_with_finite, with_kwargs=True)


def _with_finite(
    module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """vLLM's Attention.forward(query, key, value, ...), whose key and value may be None."""
    given = list(args)
    for name, place in _PLACES.items():
        if place < len(given):
            given[place] = _finite(given[place])
        elif name in more:
            more = {**more, name: _finite(more[name])}
    return tuple(given), more


def _finite(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.nan_to_num(x, 0.0, 0.0, 0.0)
