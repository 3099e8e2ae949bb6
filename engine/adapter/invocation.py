"""Where an activated adapter begins to act (aLoRA, arXiv 2504.12397).

As PEFT 0.21 has it (`calculate_alora_offsets` in tuners/lora/variants.py): from the first token of
the last occurrence of its invocation tokens in the prompt on. What is generated is not searched.
"""

from collections.abc import Iterator, Sequence

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, UnsupportedError
from molehill.engine.adapter.model import Adapter


def invocation_offset(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """The position in `prompt` from which on the adapter acts; None without an occurrence.

    prompt, invocation: token ids; of the latter at least one.
    """
    first, length = invocation[0], len(invocation)
    tokens = list(invocation)
    for start in range(len(prompt) - length, -1, -1):
        if prompt[start] == first and list(prompt[start : start + length]) == tokens:
            return start
    return None


def misfits(adapter: Adapter, base: BaseModel) -> Iterator[AdapterError]:
    """Tokens that no prompt can hold. (An activated adapter adds none of its own.)"""
    last, tokens = max(adapter.invocation_tokens, default=-1), base.num_tokens
    if tokens is not None and last >= tokens:
        expected = f"tokens below {tokens}, as the base has"
        yield UnsupportedError("alora_invocation_tokens", f"token {last}", expected)
