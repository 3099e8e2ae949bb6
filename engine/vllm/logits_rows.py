"""Which adapter each row of logits is of.

vLLM computes logits of the rows that it samples from, and of prompts whose log-probabilities are
asked for; its LoRA mapping tells the former only. `LogitsRows` follows the model runner, either of
vLLM's two, and announces the rows before each call of the model's `compute_logits`. What others
compute, as a draft model that shares the head, is the base's.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

from torch import Tensor, nn
from vllm.logger import init_logger

from molehill.kernels.interface import Run

logger = init_logger("vllm.molehill")

_CALLS = ("compute_logits", "compute_logits_local")

Announce = Callable[[Sequence[Run]], None]


class LogitsRows:
    """The logits of one worker's steps.

    announce: gets the runs of the rows that the head computes next, and none after it. hide: gets
    the logits of all rows, the announced ones and the base's, before that; None if there is nothing
    to hide.
    """

    def __init__(
        self,
        runner: Any,
        model: nn.Module,
        announce: Announce,
        hide: Callable[[Tensor], None] | None = None,
    ) -> None:
        """runner: vLLM's model runner. model: its model, whose logits are followed from now on."""
        self._announce, self._hide = announce, hide
        # Slots by row, of the step: all rows that have an adapter, and those that are sampled from.
        self._runs: list[Run] = []
        self._sampled: list[int | None] = []
        self._hidden: Tensor | None = None
        for name in _CALLS:
            if hasattr(model, name):
                setattr(model, name, self._following(getattr(model, name)))
        if hasattr(runner, "lora_state"):
            runner.sample = self._sampling(runner.sample)
        else:
            method = runner._get_prompt_logprobs_dict
            runner._get_prompt_logprobs_dict = self._reading_prompts(method)

    def begin_step(self, runs: Sequence[Run], sampled: Sequence[int | None]) -> None:
        """runs: of the step's rows, in slots with something on the head. sampled: the slot of each
        row that is sampled from, None of one without; with the second model runner of each request.
        Never raises."""
        self._runs, self._sampled, self._hidden = list(runs), list(sampled), None

    def _following(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def following(hidden_states: Tensor, *args: Any, **more: Any) -> Any:
            if not self._runs:
                return self._hidden_from(compute(hidden_states, *args, **more))
            runs = self._of(hidden_states)
            if runs is None:
                # The base's answer in an adapter's name would be worse than none.
                logger.error("molehill: logits of unknown rows are zeroed")
                logits = compute(hidden_states, *args, **more)
                return self._hidden_from(None if logits is None else logits.zero_())
            self._announce(runs)
            try:
                return self._hidden_from(compute(hidden_states, *args, **more))
            finally:
                self._announce(())

        return following

    def _hidden_from(self, logits: Tensor | None) -> Tensor | None:
        """None on ranks that do not have them."""
        if logits is not None and self._hide is not None:
            self._hide(logits)
        return logits

    def _of(self, x: Tensor) -> list[Run] | None:
        """The runs of rows `x [n, hidden]`; None where nobody knows them."""
        if self._hidden is not None:
            return self._part(x, self._hidden)
        return _in_runs(self._sampled) if len(x) == len(self._sampled) else None

    def _part(self, x: Tensor, hidden: Tensor) -> list[Run] | None:
        """Of rows that are a view of the step's."""
        if x.untyped_storage().data_ptr() != hidden.untyped_storage().data_ptr():
            return None
        start = (x.storage_offset() - hidden.storage_offset()) // hidden.stride(0)
        stop = start + len(x)
        return [
            Run(run.slot, max(run.start, start) - start, min(run.stop, stop) - start)
            for run in self._runs
            if run.start < stop and start < run.stop
        ]

    def _reading_prompts(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def reading(hidden_states: Tensor, *args: Any, **more: Any) -> Any:
            with self._viewing(hidden_states):
                return method(hidden_states, *args, **more)

        return reading

    @contextmanager
    def _viewing(self, hidden_states: Tensor) -> Iterator[None]:
        self._hidden = hidden_states
        try:
            yield
        finally:
            self._hidden = None

    def _sampling(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """The second runner computes prompts' logits after it has sampled."""

        @functools.wraps(sample)
        def sampling(hidden_states: Tensor, input_batch: Any, *args: Any, **more: Any) -> Any:
            ends = input_batch.cu_num_logits_np
            by_request, self._hidden = self._sampled, None
            if len(by_request) == len(ends) - 1:
                counts = (int(ends[i + 1] - ends[i]) for i in range(len(by_request)))
                pairs = zip(by_request, counts, strict=True)
                self._sampled = [slot for slot, count in pairs for _ in range(count)]
            try:
                return sample(hidden_states, input_batch, *args, **more)
            finally:
                self._sampled, self._hidden = by_request, hidden_states

        return sampling


def _in_runs(slots: Sequence[int | None]) -> list[Run]:
    groups = [(slot, len(list(group))) for slot, group in groupby(slots)]
    ends = accumulate(size for _, size in groups)
    return [
        Run(slot, end - size, end)
        for (slot, size), end in zip(groups, ends, strict=True)
        if slot is not None
    ]
