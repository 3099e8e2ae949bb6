"""Whether a request activates its adapter, before the engine is asked."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molehill.api.adapters.errors import NotInvokedError
from molehill.api.adapters.invocation import not_invoked
from molehill.engine.adapter.invocation import invocation_offset

# Of one step of vLLM's beam search, whose prompt ends with what the beam has generated.
BEAM = re.compile(r"-[0-9a-f]{16}-beam-\d+")

# What token ids are in words, empty where nobody knows.
Decode = Callable[[Sequence[int]], str]


def is_beam(call: Mapping[str, Any]) -> bool:
    """Whether a call of vLLM's engine client is one step of its beam search. Clients choose how an
    id begins; of their other requests all have text."""
    is_text = getattr(call.get("sampling_params"), "detokenize", True)
    return not is_text and BEAM.search(call.get("request_id", "")) is not None


def decoder(engine_client: Any) -> Decode:
    """By the tokenizer of the engine's client."""

    def decode(tokens: Sequence[int]) -> str:
        tokenizer = getattr(engine_client, "tokenizer", None)
        try:
            return str(tokenizer.decode(list(tokens))) if tokenizer is not None else ""
        except Exception:
            # Of ids that the vocabulary does not have.
            return ""

    return decode


def check_invoked(
    name: str, tokens: Sequence[int], call: Mapping[str, Any], decode: Decode
) -> None:
    """Raises NotInvokedError unless the prompt activates an adapter that has such tokens.

    call: of vLLM's engine client, by name.
    """
    if not tokens:
        return
    if is_beam(call):
        found = "beam search, which takes what it generated for a prompt"
        raise NotInvokedError(f"{found}, expected none with {name!a}, an activated adapter")
    prompt = token_ids(call["prompt"])
    if prompt is None:
        raise not_invoked(name, "a prompt without token ids", tokens, decode(tokens))
    if invocation_offset(prompt, tokens) is None:
        raise not_invoked(name, f"{len(prompt)} tokens", tokens, decode(tokens))


def token_ids(prompt: Any) -> Sequence[int] | None:
    """Of a prompt as vLLM's routes render it; None of embeddings, and of a stream of inputs."""
    if not isinstance(prompt, Mapping):
        return None
    result: Sequence[int] | None = prompt.get("decoder_prompt", prompt).get("prompt_token_ids")
    return result
