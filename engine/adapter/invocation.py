"""Where an activated adapter begins to act (aLoRA, arXiv 2504.12397).

As PEFT 0.21 has it (`calculate_alora_offsets` in tuners/lora/variants.py): from the first token of
the last occurrence of its invocation tokens in the prompt on. What is generated is not searched.
"""

from collections.abc import Sequence


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
