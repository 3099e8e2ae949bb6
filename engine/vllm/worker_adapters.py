"""The adapters of one worker: on their way to a slot, in one, and on their way out."""

from dataclasses import replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.system import startup
from molehill.engine.system.out_of_memory import is_out_of_memory
from molehill.engine.transform.merge import MergedBase
from molehill.engine.vllm import backends, scaling_pass
from molehill.engine.vllm.adapter_loader import AdapterLoader
from molehill.engine.vllm.adapter_stats import AdapterStats
from molehill.engine.vllm.host_cache import AdapterKey, HostCache, PreparedAdapter
from molehill.engine.vllm.model.patched_model import PatchedModel
from molehill.engine.vllm.prefetch import AT_ONCE, Prefetcher, StepPacer
from molehill.engine.vllm.protocol import (
    AdapterRequest,
    Empty,
    ForgetRoutesRequest,
    InstallReply,
    InstallRequest,
    PlainTensor,
    PreparedReply,
    PrepareReply,
    RoutesReply,
    RoutesRequest,
    RoutingReply,
    RoutingRequest,
    SiteTrace,
    StatsReply,
    StatsRequest,
    StepSeconds,
    TraceReply,
    TraceRequest,
    UninstallReply,
    UninstallRequest,
)
from molehill.engine.vllm.rank_agreement import OtherRankError, RankAgreement
from molehill.engine.vllm.routing_capture import RoutingCapture
from molehill.engine.vllm.settings import Settings
from molehill.engine.vllm.slot_table import BASE, FullError, SlotTable
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.interface import KernelCompilations, Packed
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.vocabulary import Vocabulary

logger = init_logger("vllm.molehill")


class WorkerAdapters:
    """Loads adapters into the backend's slots and takes them out.

    merged_base: what is in the model's weights (`--merge-into-base`). The base's rows and other
    adapters take it back. answers_last: whether vLLM reads this rank's answer after those of all
    other ranks of the engine.
    """

    def __init__(
        self,
        config: VllmConfig,
        device: torch.device,
        model: nn.Module,
        merged_base: MergedBase | None = None,
    ) -> None:
        settings = Settings.from_config(config.additional_config)
        self.backend, why = backends.for_worker(config, settings, device)
        logger.info("molehill: %s backend (%s)", self.backend.name, why)
        tp, pp = get_tp_group(), get_pp_group()
        self._ranks = RankAgreement(tp.world_size, tp.cpu_group)
        self._stages = RankAgreement(pp.world_size, pp.cpu_group)
        self.answers_last = pp.is_last_rank and tp.rank_in_group == tp.world_size - 1
        self._engine: int = config.parallel_config.data_parallel_index
        self.moes = MoeBlocks()
        self.vocabulary = Vocabulary(settings.extra_vocab)
        self.classified = _classified(config, settings, model, device)
        self.model = PatchedModel(
            config, device, model, self.backend, self.moes, self.vocabulary, self.classified
        )
        self.slots = SlotTable(
            self.backend,
            self.moes,
            self.vocabulary,
            settings.memory,
            self._ranks,
            self.classified,
        )
        self.stats = AdapterStats(self.slots.counters, self.slots.resident_bytes)
        self.pacer = StepPacer()
        self._loader = AdapterLoader(
            settings,
            self.backend,
            self.model,
            config.model_config.dtype,
            self.pacer,
            lambda: self.slots.free_bytes,
            self._ranks.is_alone,
            merged_base,
        )
        self._prefetcher = Prefetcher(self._loader.load, AT_ONCE)
        # Ranks that do not all keep the same would not meet at DoRA's collectives.
        self._host = HostCache[AdapterKey](settings.host_memory if self._ranks.is_alone else 0)
        # By id, where it was read and what it was before a slot took it.
        self._entered: dict[int, tuple[AdapterKey, PreparedAdapter]] = {}
        self._refused: set[int] = set()
        self._compilations: KernelCompilations | None = None
        # Follows the model runner, once there is one to follow.
        self.routing_capture: RoutingCapture | None = None
        if merged_base is not None:
            self.slots.store(BASE, self._loader.pack(self._loader.base_rows()))

    def compile_kernels(self, most: int) -> None:
        """Of a backend that compiles at run time, all kernels for steps of up to `most` tokens,
        before any request can wait for them; see `expect_no_compilation`. Nothing of others."""
        self._compilations = self.backend.watch_compilations()
        if self._compilations is None:
            return
        line = "compiling the GPU kernels: a minute at the first start, seconds at later ones"
        with startup.long_step("compiling the GPU kernels", line) as seconds:
            self.model.warm_up(most)
        logger.info("molehill: GPU kernels ready in %.0f s", seconds())

    def expect_no_compilation(self) -> None:
        """From here on, each compilation of a kernel is counted, and logged as a warning."""
        if self._compilations is not None:
            self._compilations.expect_none()

    def add(self, name: str, key: AdapterKey) -> None:
        """Reads, checks and stores an adapter; a second call for the same id is a no-op. Between
        steps only, on all ranks of the engine.

        Raises AdapterError, or OtherRankError when another rank refused; then no rank has it in a
        slot.
        """
        is_new = key.lora_id not in self.slots
        with self._stages.all_or_none(lambda: is_new and self.remove(key.lora_id, keep=True)):
            self._add(name, key)

    def _add(self, name: str, key: AdapterKey) -> None:
        """As `add`, on the tensor-parallel ranks of this stage alone: inside a step, other stages
        are at other steps."""
        if key.lora_id in self.slots:
            return
        kept = self._host.take(key)
        try:
            with self._ranks.all_or_none():
                loaded = kept or self._prefetcher.result(key)
                ready = loaded if isinstance(loaded, PreparedAdapter) else self._loader.pack(loaded)
            slot = self.slots.store(key.lora_id, ready)
        except Exception:
            if kept is not None:
                self._host.put(key, kept)
            raise
        self._entered[key.lora_id] = key, replace(ready, weights=Packed(None), members=())
        self.stats.enter_slot(key.lora_id, name, slot, ready.costs)
        self._refused.discard(key.lora_id)
        self._prefetcher.discard(key)
        logger.info("molehill: adapter %s stored in slot %d", name, slot)

    def add_late(self, name: str, key: AdapterKey) -> None:
        """Loads an adapter that nobody announced with `add_lora`, as plain `LLM.generate` does.

        Never raises: that would end the engine. What was refused is not tried again until it is
        removed or added.
        """
        if key.lora_id in self._refused:
            return
        try:
            self._add(name, key)
        except Exception as error:
            # The base's answer in the adapter's name would be worse than none.
            self._refused.add(key.lora_id)
            logger.error(
                "molehill: adapter %s cannot be served, its outputs are zeroed. Load adapters with "
                "add_lora first to get this error there. %s",
                name,
                error,
            )

    def remove(self, lora_id: int, keep: bool = False) -> bool:
        """Frees the adapter's slot; False if it has none. keep: in host memory, if there is any for
        it."""
        self._refused.discard(lora_id)
        if lora_id not in self.slots:
            return False
        if self.routing_capture is not None:
            self.routing_capture.leave_slot(lora_id)
        self.stats.leave_slot(lora_id)
        key, adapter = self._entered.pop(lora_id)
        packed = self.slots.erase(lora_id)
        if keep and packed is not None:
            self._host.put(key, replace(adapter, weights=packed))
        return True

    def invocation_of(self, lora_id: int) -> tuple[int, ...] | None:
        """See Adapter.invocation_tokens; None of an adapter that is in no slot."""
        entered = self._entered.get(lora_id)
        return None if entered is None else entered[1].invocation_tokens

    # What molehill's API asks for

    def describe(self, request: Empty) -> BaseModel:
        """The base model's shapes."""
        return self.model.base

    def prepare(self, request: AdapterRequest) -> PrepareReply:
        """Starts to read a copy of the store in a thread, unless it is in host memory."""
        key = AdapterKey(request.lora_int_id, request.path)
        if key in self._host:
            return PrepareReply(reads=False)
        self._prefetcher.start(key)
        return PrepareReply(reads=True)

    def prepared(self, request: AdapterRequest) -> PreparedReply:
        """Whether it has been read, or reading has failed, which `install` tells."""
        key = AdapterKey(request.lora_int_id, request.path)
        return PreparedReply(self._prefetcher.done(key))

    def discard(self, request: AdapterRequest) -> Empty:
        """Lets go of an adapter that was prepared and is not waited for any more."""
        self._prefetcher.discard(AdapterKey(request.lora_int_id, request.path))
        return Empty()

    def install(self, request: InstallRequest) -> InstallReply:
        """`_install`, whose faults are replies too: see LoRAManager.add_adapter."""
        try:
            return self._install(request)
        except Exception as error:
            logger.exception("molehill: adapter %s cannot be installed", request.name)
            return InstallReply(f"{type(error).__name__}: {error}")

    def _install(self, request: InstallRequest) -> InstallReply:
        """`add`, of what was prepared, whose refusals are replies."""
        key = AdapterKey(request.lora_int_id, request.path)
        try:
            self.add(request.name, key)
        except (FullError, OtherRankError) as error:
            return InstallReply(str(error), full=True)
        except AdapterError as error:
            self._prefetcher.discard(key)
            return InstallReply(str(error))
        except Exception as error:
            self._prefetcher.discard(key)
            if not is_out_of_memory(error):
                raise
            return InstallReply("adapter memory: a worker ran out of memory while installing it")
        return InstallReply()

    def uninstall(self, request: UninstallRequest) -> UninstallReply:
        """`remove`, and where it will not come back, of all that is kept of it."""
        key = AdapterKey(request.lora_int_id, request.path)
        self.remove(key.lora_id, request.keep)
        if not request.keep:
            self._host.drop(key)
            self._prefetcher.discard(key)
            self.stats.finish(key.lora_id)
        evicted = tuple(other.lora_id for other in self._host.take_evicted())
        return UninstallReply(key in self._host, evicted)

    def report(self, request: StatsRequest, seconds: StepSeconds | None) -> StatsReply:
        """seconds: since the start, where they are measured."""
        return StatsReply(
            get_pp_group().rank_in_group,
            self.stats.report(request.known, seconds.ops if seconds else 0.0),
            {key.lora_id: size for key, size in self._host.sizes().items()},
            seconds,
            None if self._compilations is None else self._compilations.late,
            self._engine,
        )

    def routing(self, request: RoutingRequest) -> RoutingReply:
        return RoutingReply(*self.stats.sites(request.lora_int_id), self._engine)

    def routes(self, request: RoutesRequest) -> RoutesReply:
        """What the routers chose for tokens of requests that ask for it."""
        assert self.routing_capture is not None, "set up with the model"
        stage = get_pp_group().rank_in_group
        return self.routing_capture.take(request, stage, self.stats.costs)

    def forget_routes(self, request: ForgetRoutesRequest) -> Empty:
        """Those requests ended before all was asked for."""
        if self.routing_capture is not None:
            self.routing_capture.forget(request)
        return Empty()

    def trace(self, request: TraceRequest) -> TraceReply:
        """Starts or ends recording of what the routers decide; what they did so far."""
        return TraceReply(
            [
                SiteTrace(
                    trace.site,
                    PlainTensor.of(trace.probabilities),
                    PlainTensor.of(trace.weights),
                    PlainTensor.of(trace.entropy),
                )
                for trace in self.backend.trace(request.enabled)
            ]
        )


def _classified(
    config: VllmConfig, settings: Settings, model: nn.Module, device: torch.device
) -> ClassifiedLinears | None:
    """For X-LoRA, where the worker is told to serve it. Raises RuntimeError where it cannot."""
    if not settings.xlora:
        return None
    if reason := scaling_pass.refusal(config, model, device.type):
        raise RuntimeError(f"--xlora: found {reason}, expected an engine that runs two passes")
    return ClassifiedLinears(config.model_config.get_hidden_size())
