"""What vLLM's model runner takes for its LoRA manager.

vLLM's contract (v1/worker/lora_model_runner_mixin.py) is duck-typed. The adapter of a LoRARequest
is known by its `lora_int_id`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.request import LoRARequest

from molehill.engine.vllm.host_cache import AdapterKey
from molehill.engine.vllm.invocation_rows import InvocationRows
from molehill.engine.vllm.logits_rows import LogitsRows
from molehill.engine.vllm.routing_capture import RoutingCapture
from molehill.engine.vllm.slot_table import BASE
from molehill.engine.vllm.token_rows import TokenRows
from molehill.engine.vllm.worker_adapters import WorkerAdapters
from molehill.kernels.interface import UNSERVED, Run

# In the place of the id of an adapter whose request lacks the invocation.
NOT_INVOKED = -1


class LoRAManager:
    """Adds and removes adapters as vLLM asks for it, and tells the backend whose rows a step
    holds."""

    def __init__(
        self,
        adapters: WorkerAdapters,
        activated: InvocationRows,
        routing: RoutingCapture,
        logits: LogitsRows,
        tokens: TokenRows,
    ) -> None:
        self._adapters = adapters
        self._routing = routing
        self._activated = activated
        self._logits = logits
        self._tokens = tokens
        self._slots = adapters.slots
        self._dummies: set[int] = set()

    # Adapters

    def add_adapter(self, request: LoRARequest) -> bool:
        """See WorkerAdapters.add. Where that raises, the rank that answers last does, the others
        return False: vLLM leaves what comes after the first error unread, and would take it for
        answers to its next questions."""
        try:
            self._adapters.add(request.lora_name, AdapterKey.of(request))
        except Exception:
            if self._adapters.answers_last:
                raise
            return False
        return True

    def remove_adapter(self, lora_id: int) -> bool:
        """Whether it was here."""
        return self._adapters.remove(lora_id)

    def remove_all_adapters(self) -> None:
        if self._dummies:
            # vLLM cleans up after a profiling run; with data parallelism idle ranks profile while
            # adapters serve.
            self._dummies.clear()
            return
        for lora_id in self.list_adapters():
            self.remove_adapter(lora_id)

    def list_adapters(self) -> set[int]:
        return self._slots.adapters()

    def pin_adapter(self, lora_id: int) -> bool:
        """A worker evicts nothing from its slots on its own, so every one is pinned."""
        return lora_id in self._slots

    # Steps

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Called before every forward. Never raises: that would end the engine."""
        # A set's order differs between processes; loading meets collectives.
        for request in sorted(requests, key=lambda request: request.lora_int_id):
            if request.lora_int_id not in self._slots and request.lora_int_id not in self._dummies:
                self._adapters.add_late(request.lora_name, AdapterKey.of(request))
        if mapping is not None:
            self._adapters.pacer.step_begins()
            runs = self._runs(self._without_plain_rows(mapping.index_mapping))
            self._adapters.stats.mark_active(run.slot for run in runs)
            self._routing.collect()
            self._tokens.begin_step(runs)
            self._logits.begin_step(*self._heads(runs, mapping.prompt_mapping))

    def _without_plain_rows(self, ids: Sequence[int]) -> Sequence[int]:
        """`ids` with the base's in rows before an invocation."""
        plain = self._activated.take()
        if not plain:
            return ids
        ids = list(ids)
        for start, stop, invoked in plain:
            ids[start:stop] = [BASE if invoked else NOT_INVOKED] * (stop - start)
        return ids

    def _runs(self, ids: Sequence[int]) -> list[Run]:
        """ids: of the adapter of each row."""
        runs, start = [], 0
        for lora_id, group in groupby(ids):
            stop = start + sum(1 for _ in group)
            slot = self._slot(lora_id)
            if slot is not None and not self._slots.is_idle(slot):
                runs.append(Run(slot, start, stop))
            elif slot is not None:
                self._slots.count_idle_tokens(slot, stop - start)
                self._adapters.stats.mark_active([slot])
            start = stop
        return runs

    def _heads(
        self, runs: Sequence[Run], sampled: Sequence[int]
    ) -> tuple[list[Run], list[int | None]]:
        """What of a step is in slots that change the LM head: runs of its rows, and the slots of
        the rows that are sampled from, all of which come after an invocation."""
        has_head = self._adapters.vocabulary.has_head
        on_head = [run for run in runs if has_head(run.slot)]
        if not on_head:
            return [], []
        slots = (self._slots.slot(lora_id) for lora_id in sampled)
        return on_head, [slot if slot is not None and has_head(slot) else None for slot in slots]

    def _slot(self, lora_id: int) -> int | None:
        """None for rows that are the model's as it is."""
        if lora_id in self._dummies or lora_id == NOT_INVOKED:
            return UNSERVED
        slot = self._slots.slot(lora_id)
        return UNSERVED if slot is None and lora_id > BASE else slot

    # Profiling and graph capture. A dummy adapter's rows are unserved ones, for which a GPU backend
    # launches what it launches for any adapter. vLLM captures each size once more without dummies:
    # in that graph is nothing of molehill's, and steps without adapters replay it.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        self._dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        return default

    def supports_tower_connector_lora(self) -> bool:
        return False
