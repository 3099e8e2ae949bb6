"""Rows whose adapter hangs on the ids of their tokens.

Ids of tokens that were just sampled may be on the device alone while the rows of a step are dealt
out. When the model is called they are its input: rows of a TokenAdapters are dealt to the slots of
its adapters there, and what the step's rows are is announced then. Only a step that has such rows
waits for them, and reads ids back from the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.logger import init_logger

from molehill.engine.vllm.slot_table import BASE, SlotTable
from molehill.kernels.interface import UNSERVED, Run

logger = init_logger("vllm.molehill")

Announce = Callable[[Sequence[Run]], None]


class TokenRows:
    """The rows of one worker's steps.

    announce: gets all runs of a step, once for each step and before any layer runs.
    """

    def __init__(self, model: nn.Module, slots: SlotTable, announce: Announce) -> None:
        """model: the runner's, whose next call is followed in steps that have such rows."""
        self._model, self._slots, self._announce = model, slots, announce
        self._waiting: list[Run] = []
        self._hook: RemovableHandle | None = None

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces runs; where ids decide about some, all of them with the model's call. Never
        raises."""
        self._take()
        if not any(self._slots.by_token(run.slot) for run in runs):
            self._announce(runs)
            return
        self._waiting = list(runs)
        # Should nobody call the model: the base's answer in an adapter's name is worse than none.
        self._announce([Run(UNSERVED, run.start, run.stop) for run in runs])
        # A hook that stays would cost every step some 10 us.
        self._hook = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _take(self) -> list[Run]:
        """The runs that wait for the model's call, which is followed no more."""
        waiting, self._waiting = self._waiting, []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return waiting

    def _before_forward(self, module: nn.Module, args: Any, more: dict[str, Any]) -> None:
        waiting = self._take()
        ids = more.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or len(ids) < waiting[-1].stop:
            logger.error("molehill: rows of unknown tokens are zeroed")
            return
        self._announce([part for run in waiting for part in self._dealt(run, ids)])

    def _dealt(self, run: Run, ids: Tensor) -> list[Run]:
        """A run by the slots that its tokens' ids say."""
        dealt = self._slots.by_token(run.slot)
        if dealt is None:
            return [run]
        table, slots = dealt
        places, counts = table.of(ids[run.start : run.stop].cpu()).unique_consecutive(
            return_counts=True
        )
        stops = (run.start + counts.cumsum(0)).tolist()
        starts = [run.start, *stops[:-1]]
        base = self._slots.slot(BASE)
        runs = []
        for place, start, stop in zip(places.tolist(), starts, stops, strict=True):
            slot = slots[place] if place >= 0 else base
            if place < 0:
                self._slots.count_idle_tokens(run.slot, stop - start)
            if slot is not None:
                runs.append(Run(slot, start, stop))
        return runs
