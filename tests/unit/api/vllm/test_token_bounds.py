"""Which ids a request may name, and what it gets where it asks for all of them."""

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from molehill.api.vllm.token_bounds import TokenBounds
from molehill.engine.adapter.added_tokens import AddedTokens

TOKENS = 100
# 100 and 101 are read, and 100 is answered too.
ADDED = AddedTokens(TOKENS, (100, 101), (100,))


def call(prompt: list[int], **params: Any) -> dict[str, Any]:
    return {"prompt": {"prompt_token_ids": prompt}, "sampling_params": SamplingParams(**params)}


@pytest.mark.parametrize(
    ("given", "of_adapter", "of_base"),
    [
        (call([1, 99]), None, None),
        (call([1, 101, 100]), None, "prompt"),
        (call([1, 102]), "prompt", "prompt"),
        (call([1], logit_bias={100: 1.0}), None, "logit_bias"),
        (call([1], logit_bias={101: 1.0}), "logit_bias", "logit_bias"),
        (call([1], allowed_token_ids=[100, 3]), None, "allowed_token_ids"),
        (call([1], allowed_token_ids=[102]), "allowed_token_ids", "allowed_token_ids"),
        (call([1], logprob_token_ids=[101]), "logprob_token_ids", "logprob_token_ids"),
    ],
)
def test_ids_are_those_of_the_model_that_is_asked(
    given: dict[str, Any], of_adapter: str | None, of_base: str | None
) -> None:
    bounds = TokenBounds(TOKENS, 5)
    for added, parameter in ((ADDED, of_adapter), (None, of_base)):
        if parameter is None:
            bounds.check(given, added)
            continue
        with pytest.raises(VLLMValidationError, match="is out of vocabulary") as refused:
            bounds.check(given, added)
        assert refused.value.parameter == parameter
    # Without room for added tokens, it is vLLM that says which ids there are.
    TokenBounds(TOKENS).check(given)


def test_all_log_probabilities_are_those_of_tokens_that_there_are() -> None:
    given = call([1], logprobs=-1, prompt_logprobs=-1)
    TokenBounds(TOKENS, 5).check(given, ADDED)
    assert (given["sampling_params"].logprobs, given["sampling_params"].prompt_logprobs) == (
        101,
        101,
    )
    for count, expected in ((-1, 100), (104, 100), (3, 3), (None, None)):
        given = call([1], logprobs=count)
        TokenBounds(TOKENS, 5).check(given)
        assert given["sampling_params"].logprobs == expected


def test_what_has_no_ids_is_not_looked_at() -> None:
    bounds = TokenBounds(TOKENS, 5)
    bounds.check({"prompt": object(), "sampling_params": None})
    bounds.check({"prompt": {"prompt_embeds": object()}, "pooling_params": object()})
