"""Rows that an X-LoRA computes with the gate weights of an earlier token (non-granular scalings).

Where its `non_granular_after` is k, tokens of an answer after the k-th get the k-th one's gate
weights, so their rows need no pass of the base. That token is computed before any later one is, and
once more wherever it is computed anew: as a draft in its place was refused, or its request was
preempted. So what was kept of it last holds for all that follow.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from vllm.logger import init_logger

from molehill.engine.vllm.step_following import computed_tokens, follow_steps
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.interface import UNSERVED, Run

logger = init_logger("vllm.molehill")


class _Request(NamedTuple):
    """prompt: its tokens."""

    lora_id: int
    prompt: int


class RequestRows(NamedTuple):
    """Of one request in a step. last: the row whose gate weights are kept, if it is here. start,
    stop: the rows that get them; start is stop where none is."""

    request_id: str
    slot: int
    last: int | None
    start: int
    stop: int


class NonGranularRows:
    """The requests of one worker whose adapter has such rows, and the step that is being
    prepared."""

    def __init__(
        self, runner: Any, slot_of: Callable[[int], int | None], classified: ClassifiedLinears
    ) -> None:
        """runner: vLLM's model runner, whose steps are followed from now on. slot_of: by an
        adapter's id."""
        self._slot_of, self._classified = slot_of, classified
        self._requests: dict[str, _Request] = {}
        # Gate weights `[places or 1, E]`, by request.
        self._kept: dict[str, Tensor] = {}
        self._computed: dict[str, int] = {}
        self._layout: list[tuple[str, int]] = []
        self._rows: list[RequestRows] = []
        follow_steps(runner, self)

    def follow(self, step: Any) -> None:
        """step: vLLM's SchedulerOutput."""
        for request_id in step.finished_req_ids:
            self._requests.pop(request_id, None)
            self._kept.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            if new.lora_request is not None:
                lora_id = new.lora_request.lora_int_id
                self._requests[new.req_id] = _Request(lora_id, new.prompt_len)
        self._layout = []
        self._computed = computed_tokens(step) if self._requests else {}

    def lay_out(self, request_ids: Sequence[str], num_tokens: Sequence[int]) -> None:
        """In which order, and with how many rows each, requests lie in the step."""
        if self._requests:
            self._layout = list(zip(request_ids, map(int, num_tokens), strict=False))

    def begin_step(self, runs: Sequence[Run]) -> list[Run]:
        """The runs of the step that was laid out, once its adapters are in their slots. Rows that
        nothing was kept for are unserved: the base's answer in the adapter's name would be worse
        than none."""
        runs, self._rows = list(runs), []
        for rows in self._of_layout():
            if not any(_holds(run, rows) for run in runs):
                continue
            if rows.last is None and rows.request_id not in self._kept:
                logger.error("molehill: request %s has no scalings to go on with", rows.request_id)
                runs = [part for run in runs for part in _without(run, rows)]
            else:
                self._rows.append(rows)
        return runs

    def needs_pass(self, runs: Sequence[Run]) -> bool:
        """Whether gate weights have to be made for any row of these runs."""
        classified = [run for run in runs if self._classified.has_classifier(run.slot)]
        given = sum(rows.stop - rows.start for rows in self._rows)
        return sum(run.stop - run.start for run in classified) > given

    def give(self) -> None:
        """Keeps gate weights that were made for this step, and gives kept ones to its rows."""
        for rows in self._rows:
            if rows.last is not None:
                made = self._classified.gate_weights(rows.slot, rows.last)
                self._kept[rows.request_id] = made
            if rows.start < rows.stop:
                kept = self._kept[rows.request_id]
                self._classified.give(rows.slot, rows.start, rows.stop, kept)

    def _of_layout(self) -> list[RequestRows]:
        result, start = [], 0
        for request_id, size in self._layout:
            rows = self._of_request(request_id, start, start + size)
            if rows is not None:
                result.append(rows)
            start += size
        return result

    def _of_request(self, request_id: str, start: int, stop: int) -> RequestRows | None:
        request = self._requests.get(request_id)
        slot = None if request is None else self._slot_of(request.lora_id)
        if request is None or slot is None:
            return None
        classifier = self._classified.classifier(slot)
        last = None if classifier is None else classifier.last_granular(request.prompt)
        if last is None:
            # Its rows are all alike: nothing to follow.
            del self._requests[request_id]
            return None
        row = start + last - self._computed.get(request_id, 0)
        if row >= stop:
            return None
        return RequestRows(
            request_id, slot, row if row >= start else None, max(start, row + 1), stop
        )


def _holds(run: Run, rows: RequestRows) -> bool:
    first = rows.start if rows.last is None else rows.last
    return run.slot == rows.slot and run.start <= first and rows.stop <= run.stop


def _without(run: Run, rows: RequestRows) -> list[Run]:
    """A run whose rows of that request are unserved."""
    if not _holds(run, rows):
        return [run]
    parts = (
        Run(run.slot, run.start, rows.start),
        Run(UNSERVED, rows.start, rows.stop),
        Run(run.slot, rows.stop, run.stop),
    )
    return [part for part in parts if part.start < part.stop]
