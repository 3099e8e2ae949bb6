"""Rows of a step before their request's invocation: there an activated adapter is the base.

vLLM maps rows to adapters by request. Where a request's rows lie in its prompt is in the
scheduler's output: `InvocationRows` follows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.logger import init_logger

from molehill.engine.adapter.invocation import invocation_offset
from molehill.engine.vllm.step_following import computed_tokens, follow_steps

logger = init_logger("vllm.molehill")

# By the id of an adapter: None if it is not here, empty if it acts on every token.
InvocationOf = Callable[[int], tuple[int, ...] | None]


class PlainRows(NamedTuple):
    """Rows `start` to `stop` of a step. invoked: whether the invocation comes after them, or is
    missing, so that the request has no answer."""

    start: int
    stop: int
    invoked: bool


@dataclass
class _Request:
    """offset: in the prompt, once it was looked for. prompt: None where it has no token ids."""

    name: str
    lora_id: int
    prompt: Sequence[int] | None
    offset: int | None = None
    searched: bool = False


class InvocationRows:
    """The requests of one worker that have an adapter, and the step that is being prepared."""

    def __init__(self, runner: Any, invocation_of: InvocationOf) -> None:
        """runner: vLLM's model runner, whose steps are followed from now on."""
        self._invocation_of = invocation_of
        self._requests: dict[str, _Request] = {}
        self._computed: dict[str, int] = {}
        self._layout: list[tuple[str, int]] = []
        follow_steps(runner, self)

    def follow(self, step: Any) -> None:
        """step: vLLM's SchedulerOutput."""
        for request_id in step.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            if new.lora_request is not None:
                name, lora_id = new.lora_request.lora_name, new.lora_request.lora_int_id
                self._requests[new.req_id] = _Request(name, lora_id, new.prompt_token_ids)
        self._layout = []
        self._computed = {}
        if self._requests:
            self._computed = computed_tokens(step)

    def lay_out(self, request_ids: Sequence[str], num_tokens: Sequence[int]) -> None:
        """In which order, and with how many rows each, requests lie in the step."""
        if self._requests:
            self._layout = list(zip(request_ids, map(int, num_tokens), strict=False))

    def take(self) -> list[PlainRows]:
        """Of the step that was laid out, once all its adapters are here."""
        layout, self._layout = self._layout, []
        return list(self._plain_rows(layout))

    def _plain_rows(self, layout: Sequence[tuple[str, int]]) -> Iterator[PlainRows]:
        start = 0
        for request_id, size in layout:
            request = self._requests.get(request_id)
            if request is not None and self._is_activated(request_id, request):
                computed = self._computed.get(request_id, 0)
                if request.offset is None:
                    yield PlainRows(start, start + size, invoked=False)
                elif request.offset > computed:
                    yield PlainRows(start, start + min(size, request.offset - computed), True)
            start += size

    def _is_activated(self, request_id: str, request: _Request) -> bool:
        if request.searched:
            return True
        invocation = self._invocation_of(request.lora_id)
        if not invocation:
            if invocation is not None:
                # It acts on every token: nothing to follow.
                del self._requests[request_id]
            return False
        request.searched = True
        request.offset = invocation_offset(request.prompt or (), invocation)
        request.prompt = None
        if request.offset is None:
            logger.error(
                "molehill: the prompt of request %s lacks the tokens %s that activate adapter %s: "
                "its outputs are zeroed",
                request_id,
                list(invocation),
                request.name,
            )
        return True
