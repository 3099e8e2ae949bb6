"""vLLM's `routed_experts`, on bases that route nothing: what a mixture's routers chose.

vLLM puts the experts of a mixture-of-experts base there (`--enable-return-routed-experts`), for
trainers that replay them, and refuses the option for a dense one. Of a dense one the option is
molehill's: the engine is not told, and an answer's array is the mixture's
(`molehill.engine.transform.replayed_choices`), in vLLM's own encoding, for its routes write it.
"""

from collections.abc import Mapping
from typing import Any

from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.generation import Content
from molehill.api.vllm.invocation import is_beam, token_ids
from molehill.api.vllm.request_scope import RequestScope
from molehill.engine.transform.replayed_choices import ReplayedChoices, replayed_choices

# The route whose streams have the field, in their last chunk; others' streams have none.
STREAMED = "/inference/v1/generate"


class RoutedExperts:
    """Of a server that gives mixtures' choices so. layers: of the base."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def choices(self, content: Content) -> ReplayedChoices | str:
        """How an adapter's array is laid out; why it has none, where it has none."""
        return replayed_choices(content.routers, self._layers)

    def of_call(
        self, request: RequestScope, content: Content, arguments: Mapping[str, Any]
    ) -> ReplayedChoices | None:
        """None of a call whose answer has no such array. arguments: of the call, by name."""
        parameters = arguments.get("sampling_params")
        if parameters is None or is_beam(arguments):
            return None
        streams = parameters.output_kind is RequestOutputKind.DELTA
        if request.path is None or (streams and request.path != STREAMED):
            return None
        choices = self.choices(content)
        if isinstance(choices, str) or token_ids(arguments["prompt"]) is None:
            return None
        return choices
