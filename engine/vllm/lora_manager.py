"""The adapters of one worker: what vLLM's model runner takes for its LoRA manager."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.request import LoRARequest

from molehill.engine import formats
from molehill.engine.adapter.errors import AdapterError, LimitError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.routing_stats import costs
from molehill.engine.system.out_of_memory import is_out_of_memory
from molehill.engine.transform.merge import Resident, merge_static, subtract
from molehill.engine.vllm import backends
from molehill.engine.vllm.adapter_stats import Ledger
from molehill.engine.vllm.host_cache import HostMemory, Prepared, Wanted
from molehill.engine.vllm.model.patched_model import Seams
from molehill.engine.vllm.prefetch import AT_ONCE, Preparation, Pulse
from molehill.engine.vllm.settings import Settings
from molehill.kernels.counters import SlotCounters
from molehill.kernels.interface import UNSERVED, CapacityError, Packed, Run
from molehill.kernels.moe_blocks import MoeBlocks

logger = init_logger("vllm.molehill")

# The id that vLLM gives to rows without an adapter. They have a slot only if an adapter is merged
# into the base weights.
BASE = 0


class FullError(LimitError):
    """No room beside the adapters that are here now."""


class OtherRankError(RuntimeError):
    """This rank could have served the adapter, another one refused."""


class AdapterManager:
    """Loads adapters into the backend's slots and tells it whose rows a step holds.

    vLLM's contract (v1/worker/lora_model_runner_mixin.py) is duck-typed. The adapter of a
    LoRARequest is known by its `lora_int_id`.

    resident: pairs by site that are in the model's weights (`--merge-into-base`). The base's rows
    and other adapters take them back.
    """

    def __init__(
        self,
        config: VllmConfig,
        device: torch.device,
        model: nn.Module,
        resident: Resident | None = None,
    ) -> None:
        self.settings = Settings.from_config(config.additional_config)
        self.backend, why = backends.for_worker(config, self.settings, device)
        logger.info("molehill: %s backend (%s)", self.backend.name, why)
        self._tp = get_tp_group()
        self.moes = MoeBlocks()
        self._seams = Seams(config, device, model, self.backend, self.moes)
        self._dtype = config.model_config.dtype
        self.base = self._seams.base
        self._slots: dict[int, int] = {}
        # Bytes by slot.
        self._taken: dict[int, int] = {}
        # By id, where it was read and what it was before a slot took it.
        self._entered: dict[int, tuple[Wanted, Prepared]] = {}
        # Ranks that do not all keep the same would not meet at DoRA's collectives.
        alone = self._tp.world_size == 1
        self.host = HostMemory[Wanted](self.settings.host_memory if alone else 0)
        self._refused: set[int] = set()
        self._dummies: set[int] = set()
        # Slots that hold nothing on this rank: their rows are plain, whatever their adapter.
        self._idle: set[int] = set()
        self._idle_tokens: Counter[int] = Counter()
        self._resident = resident
        self._ledger = Ledger(self._counters, self._resident_bytes)
        self._pulse = Pulse()
        self.preparation = Preparation(self._prepare, AT_ONCE)
        if resident is not None:
            base = self._on_resident(Adapter("base", {}))
            self._put(BASE, self._prepared(base))

    def _prepare(self, wanted: Wanted, beside: bool) -> Adapter | Prepared:
        """Parses, checks, merges, cuts and packs. Changes no state: it may run beside a step, and
        beside itself.

        beside: it does run beside steps, and reads a copy of the store, which the API process has
        checked against `base`.

        Cutting has to wait for a pause where ranks do it together, and where it reads the base's
        weights through the layers that the step is using.
        """
        if beside:
            adapter = native.read_own(Path(wanted.path), self._pulse.wait)
            self._pulse.wait()
        else:
            adapter = formats.read(Path(wanted.path), self.settings.limits)
            validate(adapter, self.base, self.settings.limits)
        served = self._on_resident(self._merged(adapter))
        alone = self._tp.world_size == 1
        needs_base = any("magnitude" in name for name, _ in served.tensors())
        return served if needs_base or not alone else self._prepared(served, beside)

    def _prepared(self, adapter: Adapter, beside: bool = False) -> Prepared:
        """Packed weights take memory: where there is none now, `_store` packs them, or refuses."""
        cut = self._seams.cut(adapter)
        if beside:
            self._pulse.wait()
        needed = cut.num_bytes(self._dtype)
        try:
            weights = self.backend.pack(cut) if needed <= self._free else cut
        except CapacityError as error:
            raise LimitError(error.where, error.found, error.expected) from error
        # Neither sites of other pipeline stages, nor those on the base's own experts: how many
        # tokens its router sends there is not counted.
        counted = costs(adapter, self._seams.has_counted)
        return Prepared(counted, cut.moes, needed, cut.is_empty, weights)

    def _merged(self, adapter: Adapter) -> Adapter:
        """The adapter with its static sites as one pair each."""
        if self._resident is not None and adapter.digest == self._resident.digest:
            # The very bits that are in the base weights.
            return self._resident.merged
        if not self.settings.merge:
            return adapter
        merged, sites = merge_static(adapter, self.base, self.settings.merge_tolerance)
        for site in sites:
            if site.error:
                text = "molehill: %s: experts merged with relative error %.3g"
                logger.info(text, site.site, site.error)
        if sites:
            before, after = sum(s.rank_before for s in sites), sum(s.rank_after for s in sites)
            text = "molehill: %d static sites merged, %d rank rows to %d"
            logger.info(text, len(sites), before, after)
        return merged

    def _on_resident(self, adapter: Adapter) -> Adapter:
        return subtract(adapter, self._resident.pairs) if self._resident else adapter

    # vLLM's contract: adapters

    def add_adapter(self, request: LoRARequest) -> bool:
        """Reads, checks and stores an adapter; a second call for the same id is a no-op.

        Raises AdapterError, or RuntimeError when another tensor-parallel rank refused; then no rank
        keeps anything.
        """
        if request.lora_int_id in self._slots:
            return True
        wanted = Wanted.of(request)
        kept = self.host.take(wanted)
        try:
            with self._all_ranks_or_none():
                found = kept or self.preparation.take(wanted)
                ready = found if isinstance(found, Prepared) else self._prepared(found)
            slot = self._put(request.lora_int_id, ready)
        except Exception:
            if kept is not None:
                self.host.put(wanted, kept)
            raise
        self._entered[request.lora_int_id] = wanted, replace(ready, weights=Packed(None))
        self._ledger.enter(request.lora_int_id, request.lora_name, slot, ready.costs)
        self._refused.discard(request.lora_int_id)
        self.preparation.drop(wanted)
        logger.info("molehill: adapter %s stored in slot %d", request.lora_name, slot)
        return True

    def _put(self, lora_id: int, adapter: Prepared) -> int:
        """Stores an adapter's share of this rank; returns its slot."""
        slot = next(slot for slot in count() if slot not in self._slots.values())
        with self._all_ranks_or_none(undo=slot):
            self._store(slot, adapter)
        self._slots[lora_id] = slot
        self._taken[slot] = self._resident_bytes(slot)
        if adapter.is_empty:
            self._idle.add(slot)
        return slot

    @property
    def _free(self) -> int:
        return self.settings.memory - sum(self._taken.values())

    def _store(self, slot: int, adapter: Prepared) -> None:
        """Raises LimitError before anything is written if the memory for adapters is spent."""
        needed, free = adapter.num_bytes, self._free
        if needed > free:
            of = f"at most {free} of {self.settings.memory}"
            raise self._over_memory(needed, of)
        try:
            self.moes.store(slot, adapter.moes)
            self.backend.store(slot, adapter.weights)
        except Exception as error:
            self.moes.erase(slot)
            if isinstance(error, CapacityError):
                full = FullError if self.list_adapters() else LimitError
                raise full(error.where, error.found, error.expected) from error
            if is_out_of_memory(error):
                raise self._over_memory(needed, "memory to be had") from error
            raise

    def _over_memory(self, needed: int, expected: str) -> LimitError:
        # A full memory may have room later, an adapter that is larger than all of it never fits.
        fits = needed <= self.settings.memory and self.list_adapters()
        error = FullError if fits else LimitError
        return error("adapter memory", f"{needed} bytes", expected)

    def _erase(self, slot: int) -> Packed | None:
        self.moes.erase(slot)
        return self.backend.erase(slot)

    def _resident_bytes(self, slot: int) -> int:
        return self.backend.resident_bytes(slot) + self.moes.resident_bytes(slot)

    @contextmanager
    def _all_ranks_or_none(self, undo: int | None = None) -> Iterator[None]:
        """Either the body succeeds on every tensor-parallel rank, or it raises on every one.

        undo: a slot to erase where the body succeeded but another rank failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = torch.tensor([error is not None], dtype=torch.int32)
        if self._tp.world_size > 1:
            torch.distributed.all_reduce(failed, group=self._tp.cpu_group)
        if error is not None:
            raise error
        if failed.item():
            if undo is not None:
                self._erase(undo)
            raise OtherRankError("another tensor-parallel rank could not load the adapter")

    def remove_adapter(self, lora_id: int, keep: bool = False) -> bool:
        """keep: in host memory, if there is any for it."""
        self._refused.discard(lora_id)
        slot = self._slots.pop(lora_id, None)
        if slot is None:
            return False
        self._ledger.leave(lora_id)
        wanted, adapter = self._entered.pop(lora_id)
        packed = self._erase(slot)
        if keep and packed is not None:
            self.host.put(wanted, replace(adapter, weights=packed))
        del self._taken[slot]
        self._idle.discard(slot)
        del self._idle_tokens[slot]
        return True

    def forget(self, wanted: Wanted) -> None:
        """A removed adapter will not come back."""
        self.host.drop(wanted)
        self.preparation.drop(wanted)
        self._ledger.close(wanted.lora_id)

    def remove_all_adapters(self) -> None:
        if self._dummies:
            # vLLM cleans up after a profiling run; with data parallelism idle ranks profile while
            # adapters serve.
            self._dummies.clear()
            return
        for lora_id in self.list_adapters():
            self.remove_adapter(lora_id)

    def list_adapters(self) -> set[int]:
        return set(self._slots) - {BASE}

    def pin_adapter(self, lora_id: int) -> bool:
        """Stored adapters are never evicted, so every one is pinned."""
        return lora_id in self._slots

    # vLLM's contract: steps

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Called before every forward. Never raises: that would end the engine."""
        # A set's order differs between processes; loading meets collectives.
        for request in sorted(requests, key=lambda request: request.lora_int_id):
            if request.lora_int_id not in self._slots.keys() | self._dummies:
                self._add_late(request)
        if mapping is not None:
            self._pulse.beat()
            runs = self._runs(mapping.index_mapping)
            self._ledger.touch(run.slot for run in runs)
            self.backend.begin_step(runs)
            self.moes.begin_step(runs)

    def _add_late(self, request: LoRARequest) -> None:
        """Loads an adapter that nobody announced with `add_lora`, as plain `LLM.generate` does."""
        if request.lora_int_id in self._refused:
            return
        try:
            self.add_adapter(request)
        except Exception as error:
            # The base's answer in the adapter's name would be worse than none.
            self._refused.add(request.lora_int_id)
            logger.error(
                "molehill: adapter %s cannot be served, its outputs are zeroed. Load adapters with "
                "add_lora first to get this error there. %s",
                request.lora_name,
                error,
            )

    def _runs(self, ids: Sequence[int]) -> list[Run]:
        runs, start = [], 0
        for lora_id, group in groupby(ids):
            stop = start + sum(1 for _ in group)
            slot = self._slot(lora_id)
            if slot is not None and slot not in self._idle:
                runs.append(Run(slot, start, stop))
            elif slot is not None:
                self._idle_tokens[slot] += stop - start
                self._ledger.touch([slot])
            start = stop
        return runs

    def _slot(self, lora_id: int) -> int | None:
        """None for rows that are the model's as it is."""
        if lora_id in self._dummies:
            return UNSERVED
        return self._slots.get(lora_id, UNSERVED if lora_id > BASE else None)

    # vLLM's contract: profiling and graph capture. A dummy adapter's rows are unserved ones, for
    # which a GPU backend launches what it launches for any adapter.

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

    # What molehill's API asks for

    def prepare(self, wanted: Wanted) -> bool:
        """Starts to read a copy of the store in a thread, unless it is in host memory."""
        if wanted in self.host:
            return False
        self.preparation.start(wanted)
        return True

    def install(self, request: LoRARequest) -> dict[str, Any]:
        """`add_adapter` whose refusals are answers.

        refusal: why not, or empty. full: it is for other adapters' memory, and can change.
        """
        try:
            self.add_adapter(request)
        except (FullError, OtherRankError) as error:
            return {"refusal": str(error), "full": True}
        except AdapterError as error:
            self.preparation.drop(Wanted.of(request))
            return {"refusal": str(error), "full": False}
        except Exception as error:
            self.preparation.drop(Wanted.of(request))
            if not is_out_of_memory(error):
                raise
            refusal = "adapter memory: found none left on this machine, expected some"
            return {"refusal": refusal, "full": False}
        return {"refusal": "", "full": False}

    def describe(self) -> dict[str, Any]:
        return asdict(self.base)

    def stats(self, known: Sequence[int], op_seconds: float) -> dict[str, Any]:
        """stage: this worker's of the pipeline. adapters: see Ledger.settle. host: bytes of the
        adapters in host memory, by id."""
        return {
            "stage": get_pp_group().rank_in_group,
            "adapters": self._ledger.settle(known, op_seconds),
            "host": {wanted.lora_id: size for wanted, size in self.host.sizes().items()},
        }

    def routing(self, lora_id: int) -> dict[str, Any]:
        """tokens, and sites: fields of SiteFigures by site, of this worker's pipeline stage."""
        tokens, sites = self._ledger.sites(lora_id)
        return {"tokens": tokens, "sites": {site: vars(own) for site, own in sites.items()}}

    def _counters(self, slot: int) -> SlotCounters:
        counters = self.backend.counters(slot)
        return replace(counters, tokens=counters.tokens + self._idle_tokens[slot])
