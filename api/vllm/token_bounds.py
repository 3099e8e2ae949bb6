"""The ids that a request may name: those of the base, and the added tokens of its adapter.

vLLM takes the added tokens of all adapters for the model's own, so this is checked before it.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from molehill.api.vllm.invocation import token_ids
from molehill.engine.adapter.added_tokens import NO_TOKENS, AddedTokens

_LISTS = ("allowed_token_ids", "logprob_token_ids", "prompt_logprob_token_ids")
_COUNTS = ("logprobs", "prompt_logprobs")
# Of log-probabilities: as many as there are tokens.
_ALL = -1


class TokenBounds:
    """num_tokens: of the base's own vocabulary. extra_tokens: ids after it that adapters may have
    tokens at; with none, vLLM's own checks do."""

    def __init__(self, num_tokens: int | None = None, extra_tokens: int = 0) -> None:
        self._num_tokens = (num_tokens or 0) if extra_tokens else None

    def check(self, call: Mapping[str, Any], added: AddedTokens | None = None) -> None:
        """Raises VLLMValidationError for the first id that the request's model does not have, and
        has the most log-probabilities be those of the tokens that it has.

        call: `prompt` and `sampling_params` of a call of vLLM's engine client. added: the adapter's
        tokens.
        """
        if self._num_tokens is None:
            return
        added = added or NO_TOKENS
        self._expect("prompt", token_ids(call.get("prompt")) or (), added.read)
        params = call.get("sampling_params")
        if not isinstance(params, SamplingParams):
            return
        for name in _LISTS:
            self._expect(name, getattr(params, name, None) or (), added.answered)
        self._expect("logit_bias", map(int, params.logit_bias or ()), added.answered)
        most = self._num_tokens + len(added.answered)
        for name in _COUNTS:
            count = getattr(params, name)
            if count is not None and (count == _ALL or count > most):
                setattr(params, name, most)

    def _expect(self, parameter: str, ids: Iterable[int], added: Collection[int]) -> None:
        assert self._num_tokens is not None
        beyond = {number for number in ids if number >= self._num_tokens}
        unknown = sorted(beyond.difference(added))
        if unknown:
            message = f"Token id {unknown[0]} is out of vocabulary"
            raise VLLMValidationError(message, parameter=parameter)
