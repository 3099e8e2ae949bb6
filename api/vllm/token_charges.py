"""What one call of the engine client takes of the names that its request asked for, in tokens."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from vllm.outputs import RequestOutput

from molehill.api.vllm.invocation import is_beam, token_ids


def prompt_tokens(prompt: Any) -> int:
    """Of a prompt as vLLM's routes render it; 0 of a stream of inputs."""
    tokens = token_ids(prompt)
    if tokens is None and isinstance(prompt, Mapping):
        tokens = prompt.get("decoder_prompt", prompt).get("prompt_embeds")
    return 0 if tokens is None else len(tokens)


def is_later_beam(call: Mapping[str, Any], first: bool) -> bool:
    """Whether a call, its arguments by name, is a step of vLLM's beam search, whose prompt is what
    it generated, and not the `first` of its request."""
    return not first and is_beam(call)


async def charged(
    outputs: AsyncGenerator[Any, None], charge: Callable[[int], None], deltas: bool
) -> AsyncGenerator[Any, None]:
    """The same outputs; what each has generated is charged as it comes.

    deltas: whether each output holds only what is new, or replaces the one before it.
    """
    before: dict[int, int] = {}
    async with aclosing(outputs):
        async for output in outputs:
            if isinstance(output, RequestOutput):
                for sample in output.outputs:
                    count = len(sample.token_ids)
                    charge(count if deltas else max(0, count - before.get(sample.index, 0)))
                    before[sample.index] = count
            yield output
