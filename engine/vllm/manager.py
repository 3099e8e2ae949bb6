"""The adapters of one worker: what vLLM's model runner takes for its LoRA manager."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group, get_world_group
from vllm.logger import init_logger
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.request import LoRARequest

from molehill.engine import formats
from molehill.engine.adapter import Adapter, natural_key
from molehill.engine.base import BaseModel
from molehill.engine.errors import AdapterError, LimitError
from molehill.engine.figures import SiteCost, costs
from molehill.engine.validation import validate
from molehill.engine.vllm import backends, layers, shards
from molehill.engine.vllm.hooks import hook_ffn, hook_linear
from molehill.engine.vllm.ledger import Ledger
from molehill.engine.vllm.preparing import Preparation
from molehill.engine.vllm.settings import Settings
from molehill.kernels.backend import (
    UNSERVED,
    CapacityError,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import FfnMixture, LinearMixture

logger = init_logger("vllm.molehill")


class FullError(LimitError):
    """No room beside the adapters that are here now."""


class OtherRankError(RuntimeError):
    """This rank could have served the adapter, another one refused."""


class AdapterManager:
    """Loads adapters into the backend's slots and tells it whose rows a step holds.

    vLLM's contract (v1/worker/lora_model_runner_mixin.py) is duck-typed. The adapter of a
    LoRARequest is known by its `lora_int_id`.
    """

    def __init__(self, config: VllmConfig, device: torch.device, model: nn.Module) -> None:
        self.settings = Settings.from_config(config.additional_config)
        self.backend, why = backends.for_worker(config, self.settings, device)
        logger.info("molehill: %s backend (%s)", self.backend.name, why)
        self._tp = get_tp_group()
        self._linears = layers.find_linears(model)
        self._ffns = layers.find_ffns(self._linears, model)
        if not self._linears:
            raise RuntimeError(f"{type(model).__name__} has no linear that molehill can hook")
        self._by_name = {linear.name: linear for linear in self._linears}
        self._projections = {
            projection.site: (linear, projection)
            for linear in self._linears
            for projection in linear.projections
        }
        self._handles: dict[str, int] = {}
        self._ffn_handles: dict[str, int] = {}
        self._dtype = config.model_config.dtype
        self._install(self._dtype, device)
        self.base = self._describe_base(config)
        self._slots: dict[int, int] = {}
        self._refused: set[int] = set()
        self._dummies: set[int] = set()
        self._ledger = Ledger(self.backend)
        self.preparation = Preparation(self._prepare)

    def _prepare(self, path: str) -> tuple[Adapter, SlotWeights | None]:
        """Parses, checks and cuts. Changes no state, so that it may run beside a step.

        Cutting has to wait for a pause where ranks do it together, and where it reads the base's
        weights through the layers that the step is using.
        """
        adapter = formats.read(Path(path), self.settings.limits)
        validate(adapter, self.base, self.settings.limits)
        alone = self._tp.world_size == 1
        needs_base = any("magnitude" in name for name, _ in adapter.tensors())
        return adapter, self._cut(adapter) if alone and not needs_base else None

    def _install(self, dtype: torch.dtype, device: torch.device) -> None:
        handles = self._handles
        for linear in self._linears:
            reduce = self._sum_over_ranks if linear.input_is_sharded else None
            shape = LinearShape(
                linear.name, linear.in_features, linear.out_features, dtype, device, reduce
            )
            handles[linear.name] = self.backend.register_linear(shape)
            hook_linear(linear.module, handles[linear.name], self.backend.linear_op)
        for ffn in self._ffns:
            width = self._by_name[ffn.down].in_features
            handle = self.backend.register_ffn(
                FfnShape(ffn.site, handles[ffn.gate_up], handles[ffn.down], width)
            )
            self._ffn_handles[ffn.site] = handle
            hook_ffn(ffn, handle, self.backend.ffn_op)
        self.backend.seal()
        hooked = len(self._linears), len(self._ffns)
        logger.info("molehill: %d linears and %d FFNs hooked", *hooked)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._tp.all_reduce(tensor)
        return total

    def _describe_base(self, config: VllmConfig) -> BaseModel:
        """Shapes of the whole model: pipeline stages hold different layers, so they are united."""
        own = (
            {
                site: (projection.in_features, projection.out_features)
                for site, (_, projection) in self._projections.items()
            },
            {ffn.site: ffn.activation for ffn in self._ffns},
        )
        world = get_world_group()
        everyone: list[Any] = [own] * world.world_size
        if world.world_size > 1:
            torch.distributed.all_gather_object(everyone, own, group=world.cpu_group)
        return BaseModel(
            name=config.model_config.model,
            architecture=config.model_config.architectures[0],
            linears={site: shape for linears, _ in everyone for site, shape in linears.items()},
            ffns={site: name for _, ffns in everyone for site, name in ffns.items()},
        )

    # vLLM's contract: adapters

    def add_adapter(self, request: LoRARequest) -> bool:
        """Reads, checks and stores an adapter; a second call for the same id is a no-op.

        Raises AdapterError, or RuntimeError when another tensor-parallel rank refused; then no rank
        keeps anything.
        """
        if request.lora_int_id in self._slots:
            return True
        slot = next(slot for slot in count() if slot not in self._slots.values())
        with self._all_ranks_or_none():
            adapter, weights = self.preparation.take(request.lora_path)
        weights = weights or self._cut(adapter)
        with self._all_ranks_or_none(undo=slot):
            self._store(slot, weights)
        self._slots[request.lora_int_id] = slot
        self._ledger.enter(request.lora_int_id, request.lora_name, slot, self._costs(adapter))
        self._refused.discard(request.lora_int_id)
        self.preparation.drop(request.lora_path)
        logger.info("molehill: adapter %s stored in slot %d", request.lora_name, slot)
        return True

    def _store(self, slot: int, weights: SlotWeights) -> None:
        """Raises LimitError before anything is written if the memory for adapters is spent."""
        needed = weights.num_bytes(self._dtype)
        taken = sum(map(self.backend.resident_bytes, self._slots.values()))
        free = self.settings.memory - taken
        if needed > free:
            of = f"at most {free} of {self.settings.memory}"
            raise self._over_memory(needed, of)
        try:
            self.backend.store(slot, weights)
        except CapacityError as error:
            full = LimitError if not self._slots else FullError
            raise full(error.where, error.found, error.expected) from error
        except MemoryError as error:
            raise self._over_memory(needed, "memory to be had") from error

    def _over_memory(self, needed: int, expected: str) -> LimitError:
        # A full memory may have room later, an adapter that is larger than all of it never fits.
        error = FullError if needed <= self.settings.memory and self._slots else LimitError
        return error("adapter memory", f"{needed} bytes", expected)

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
                self.backend.erase(undo)
            raise OtherRankError("another tensor-parallel rank could not load the adapter")

    def _cut(self, adapter: Adapter) -> SlotWeights:
        """This rank's share of an adapter; sites of other pipeline stages are left out."""
        linears: dict[int, list[LinearPiece]] = {}
        ffns = {}
        # In one order on all ranks: DoRA's norms are summed over them on the way.
        for site in sorted(adapter.sites, key=natural_key):
            mixture = adapter.sites[site]
            if isinstance(mixture, FfnMixture):
                if site in self._ffn_handles:
                    ffns[self._ffn_handles[site]] = self._cut_ffn(site, mixture)
            elif site in self._projections:
                handle, piece = self._cut_linear(site, mixture)
                linears.setdefault(handle, []).append(piece)
        return SlotWeights(linears, ffns)

    def _cut_linear(self, site: str, mixture: LinearMixture) -> tuple[int, LinearPiece]:
        linear, projection = self._projections[site]
        return self._handles[linear.name], shards.cut_linear(
            mixture, linear, projection, self._sum_over_ranks
        )

    def _cut_ffn(self, site: str, mixture: FfnMixture) -> FfnPiece:
        ffn = next(ffn for ffn in self._ffns if ffn.site == site)
        gate_up, down = self._by_name[ffn.gate_up], self._by_name[ffn.down]
        return shards.cut_ffn(mixture, ffn, gate_up, down, self._tp.rank_in_group == 0)

    def remove_adapter(self, lora_id: int) -> bool:
        self._refused.discard(lora_id)
        slot = self._slots.pop(lora_id, None)
        if slot is None:
            return False
        self._ledger.leave(lora_id)
        self.backend.erase(slot)
        return True

    def remove_all_adapters(self) -> None:
        if self._dummies:
            # vLLM cleans up after a profiling run; with data parallelism idle ranks profile while
            # adapters serve.
            self._dummies.clear()
            return
        for lora_id in list(self._slots):
            self.remove_adapter(lora_id)

    def list_adapters(self) -> set[int]:
        return set(self._slots)

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
            runs = self._runs(mapping.index_mapping)
            self._ledger.touch(run.slot for run in runs)
            self.backend.begin_step(runs)

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
            if lora_id > 0:
                slot = UNSERVED if lora_id in self._dummies else self._slots.get(lora_id, UNSERVED)
                runs.append(Run(slot, start, stop))
            start = stop
        return runs

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

    def install(self, request: LoRARequest) -> dict[str, Any]:
        """`add_adapter` whose refusals are answers.

        refusal: why not, or empty. full: it is for other adapters' memory, and can change.
        """
        try:
            self.add_adapter(request)
        except (FullError, OtherRankError) as error:
            return {"refusal": str(error), "full": True}
        except AdapterError as error:
            self.preparation.drop(request.lora_path)
            return {"refusal": str(error), "full": False}
        return {"refusal": "", "full": False}

    def describe(self) -> dict[str, Any]:
        return asdict(self.base)

    def stats(self, known: Sequence[int]) -> dict[str, Any]:
        """stage: this worker's of the pipeline. adapters: see Ledger.settle."""
        return {"stage": get_pp_group().rank_in_group, "adapters": self._ledger.settle(known)}

    def routing(self, lora_id: int) -> dict[str, Any]:
        """tokens, and sites: fields of SiteFigures by site, of this worker's pipeline stage."""
        tokens, sites = self._ledger.sites(lora_id)
        return {"tokens": tokens, "sites": {site: asdict(own) for site, own in sites.items()}}

    def _costs(self, adapter: Adapter) -> dict[str, SiteCost]:
        """Of the sites that lie on this pipeline stage."""
        here = self._ffn_handles.keys() | self._projections.keys()
        return {site: cost for site, cost in costs(adapter).items() if site in here}
