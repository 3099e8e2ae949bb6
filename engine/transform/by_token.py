"""Adapters of which each token has one by its id: MoLoRA's routing by vocabulary structure (arXiv
2603.15965), where text and image tokens, say, have adapters of their own.

The paper's abstract says what is routed: single tokens, each to one adapter (work N for N tokens).
What is computed here is defined in docs/format.md.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.engine.transform.weighted_sum import Part, common_base, warnings


def by_token(parts: Sequence[Part], adapter_of: Tensor, other: int) -> Adapter:
    """y = W x + what the adapter of the token's id adds, at every linear of the base.

    parts: each with the scale 1. adapter_of, other: as in TokenAdapters.
    """
    adapters = {
        part.name: replace(part.adapter, invocation_tokens=(), warnings=(), base_model=None)
        for part in parts
    }
    members = [part.adapter for part in parts]
    table = TokenAdapters(adapters, adapter_of, other)
    return Adapter("molora", {}, common_base(members), warnings(parts), by_token=table)
