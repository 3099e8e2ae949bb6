"""Whether an adapter changes anything: the base model and the adapter answer one probe prompt.

An adapter can be well-formed and still do nothing, by too small a scale or because it never reaches
the layers that it names. It would be the base model under another name.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from vllm.sampling_params import SamplingParams

from molehill.api.adapters.errors import NoEffectError, NotProbedError
from molehill.api.adapters.generation import Generation
from molehill.api.vllm.spans import Spans

logger = logging.getLogger("vllm.molehill")

# A few tokens hardly lengthen the step of those who are being served; more are asked before an
# adapter is refused. One token would not do: attention over it alone is blind to q and k.
SHORT_TOKENS = 3
PROMPT_TOKENS = 16

# Of the prompt's token and the most likely one at each position: token to log-probability.
PromptLogprobs = list[Mapping[int, float]]


class Prober:
    """Asks an engine client. vocabulary: of the base model, from which the prompt is spread. spans:
    None where nothing is traced."""

    def __init__(
        self, generate: Callable[..., Any], vocabulary: int, spans: Spans | None = None
    ) -> None:
        self._generate = generate
        self._spans = spans
        step = max(1, vocabulary // PROMPT_TOKENS)
        self._prompt = [min(i * step + step // 2, vocabulary - 1) for i in range(PROMPT_TOKENS)]
        self._asked = 0

    async def __call__(self, generation: Generation) -> None:
        """Raises NoEffectError if every log-probability is the base's, to the last bit, and
        NotProbedError where the engine gives none.

        What else is in a batch can move the last bit too, so an adapter without effect may pass on
        a busy server; one with an effect is never refused for it.
        """
        if self._spans is None:
            await self._probe(generation, {})
            return
        with self._spans.probe(generation) as headers:
            await self._probe(generation, {"trace_headers": headers})

    async def _probe(self, generation: Generation, more: Mapping[str, Any]) -> None:
        """more: what the engine is asked besides."""
        for tokens in (SHORT_TOKENS, PROMPT_TOKENS):
            # An activated adapter acts on the prompt from its invocation on.
            content = generation.content
            special = [*content.invocation_tokens, *content.probe_tokens]
            prompt = [*special, *self._prompt[:tokens]]
            if await self._differs(generation, prompt, more):
                return
        raise NoEffectError(
            f"{generation.name!a}: found the base model's log-probabilities at all of "
            f"{len(prompt)} probe tokens, expected a difference; allow_noop serves it anyway"
        )

    async def _differs(
        self, generation: Generation, prompt: list[int], more: Mapping[str, Any]
    ) -> bool:
        try:
            base = await self._answer(None, prompt, more)
            adapted = await self._answer(generation.request, prompt, more)
        except Exception as error:
            logger.exception("Adapter %s could not be probed", generation.name)
            raise NotProbedError(
                f"{generation.name!a}: found no answer to the probe prompt ({type(error).__name__})"
                ", expected log-probabilities; try again, or serve it unprobed with allow_noop or "
                "--no-adapter-probe"
            ) from error
        return adapted != base

    async def _answer(
        self, request: Any, prompt: list[int], more: Mapping[str, Any]
    ) -> PromptLogprobs:
        self._asked += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        last: Any = None
        async for output in self._generate(
            {"prompt_token_ids": prompt},
            params,
            f"molehill-probe-{self._asked}",
            lora_request=request,
            **more,
        ):
            last = output
        if last is None or not last.prompt_logprobs:
            raise RuntimeError("the engine gave no log-probabilities of the prompt")
        return [
            {token: entry.logprob for token, entry in position.items()}
            for position in last.prompt_logprobs
            if position
        ]
