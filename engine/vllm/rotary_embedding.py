"""Rotary embeddings of queries whose heads are a dimension of their own, on CPU.

vLLM's CPU kernel takes the last dimension but one for the tokens. Of `[tokens, heads, head_size]`
(LFM2, and MLA without YaRN) it then turns some heads by the positions of other tokens, of other
requests too, and leaves the rest as they are. vLLM's own definition in PyTorch takes both shapes.
"""

import functools
from typing import Any

from torch import Tensor


def install() -> None:
    """Replaces the call of the kernel in this process, before a model is made; without effect a
    second time."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu
    if hasattr(original, "takes_heads_apart"):
        return

    @functools.wraps(original)
    def forward_cpu(
        self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not any(_has_heads_apart(heads, positions) for heads in (query, key)):
            return original(self, positions, query, key)  # type: ignore[no-any-return]
        rotated_query, rotated_key = self.forward_native(positions, query, key)
        # In place, as the kernel does it.
        query.copy_(rotated_query)
        if key is not None:
            key.copy_(rotated_key)
        return query, key

    forward_cpu.takes_heads_apart = True  # type: ignore[attr-defined]
    RotaryEmbedding.forward_cpu = forward_cpu


def _has_heads_apart(heads: Tensor | None, positions: Tensor) -> bool:
    """Whether it has a dimension of heads beside those of the tokens and one of numbers."""
    return heads is not None and heads.ndim > positions.ndim + 1
