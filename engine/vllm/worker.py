"""The workers that vLLM runs when it is given `worker_cls="molehill.engine.vllm.worker.Worker"`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from molehill.engine.system import startup
from molehill.engine.system.cpu_affinity import affinity
from molehill.engine.transform.merge import MergedBase
from molehill.engine.vllm import (
    backends,
    compat,
    compilation,
    precision,
    protocol,
    quantisation,
    rotary_embedding,
    scaling_pass,
    token_ranks,
)
from molehill.engine.vllm.invocation_rows import InvocationRows
from molehill.engine.vllm.logits_rows import LogitsRows
from molehill.engine.vllm.lora_manager import LoRAManager
from molehill.engine.vllm.model import moe_blocks
from molehill.engine.vllm.non_granular_rows import NonGranularRows
from molehill.engine.vllm.pipeline import make_stage_inputs
from molehill.engine.vllm.routing_capture import RoutingCapture
from molehill.engine.vllm.scaling_pass import ScalingPass
from molehill.engine.vllm.settings import Settings
from molehill.engine.vllm.step_timer import StepTimer
from molehill.engine.vllm.token_rows import TokenRows
from molehill.engine.vllm.worker_adapters import WorkerAdapters
from molehill.kernels.interface import Run

compat.check_version()
logger = init_logger("vllm.molehill")

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):  # type: ignore[misc]
    """vLLM's worker with molehill's LoRA manager in place of vLLM's.

    Methods named `molehill_*` are reached with `collective_rpc`.
    """

    adapters: WorkerAdapters
    step_timer: StepTimer | None = None
    _merged_base: MergedBase | None

    def init_device(self) -> None:
        startup.follow()
        super().init_device()
        compat.check_seams()
        if self.vllm_config.lora_config is None:
            raise RuntimeError("molehill's worker needs enable_lora=True (--enable-lora)")
        if current_platform.is_cpu():
            model = self.vllm_config.model_config
            precision.check(model.hf_config, str(model.dtype).removeprefix("torch."))
            quantisation.check(model.hf_config)
            if inexact := quantisation.warning(model.hf_config):
                logger.warning("molehill: %s", inexact)
            rotary_embedding.install()
            token_ranks.install()
        else:
            compilation.warn_of_one_graph(self.vllm_config)
        self.model_runner.load_lora_model = self._load_lora_model

    def load_model(self, **kwargs: Any) -> None:
        startup.enter("loading the base model")
        self._merged_base = self._change_checkpoint()
        with moe_blocks.on_cpu_kernels(self.vllm_config):
            super().load_model(**kwargs)
        if not isinstance(getattr(self.model_runner, "lora_manager", None), LoRAManager):
            raise RuntimeError("vLLM did not install molehill's LoRA manager")
        if self.adapters.backend.seconds() is not None:
            self.step_timer = StepTimer(self.model_runner, self.adapters.backend.seconds)

    def _change_checkpoint(self) -> MergedBase | None:
        # Imports vLLM's loaders, which must not be before the platform's worker is set up.
        from molehill.engine.vllm.model import (
            checkpoint_loader,
            extra_vocabulary,
            merged_base_loader,
        )

        settings = Settings.from_config(self.vllm_config.additional_config)
        checkpoint_loader.begin()
        directory = None if settings.merged_base is None else Path(settings.merged_base)
        merged_base = merged_base_loader.install(
            self.vllm_config, directory, settings.merged_base_digest, settings.limits
        )
        extra_vocabulary.install(self.vllm_config, settings.extra_vocab)
        return merged_base

    def determine_available_memory(self) -> int:
        """Runs the model for the first time, which compiles it. Our kernels are compiled before,
        while the memory that takes is free."""
        if not current_platform.is_cpu():
            self.adapters.compile_kernels(backends.longest_step(self.vllm_config))
            torch.accelerator.empty_cache()
        with compilation.announced(self.vllm_config):
            available: int = super().determine_available_memory()
        startup.enter("setting up the KV cache")
        return available

    def compile_or_warm_up_model(self) -> Any:
        """Captures graphs, if there are any; then requests may come."""
        done = super().compile_or_warm_up_model()
        if current_platform.is_cpu():
            make_stage_inputs(self.model_runner)
        self.adapters.expect_no_compilation()
        return done

    def _load_lora_model(
        self, model: nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> nn.Module:
        self.adapters = WorkerAdapters(vllm_config, device, model, self._merged_base)
        if device.type == "cpu":
            # Imports vLLM's layers, which must not be before the platform's worker is set up.
            from molehill.engine.vllm.model.finite_cache import keep_finite

            keep_finite(model)
        activated = InvocationRows(self.model_runner, self.adapters.invocation_of)
        adapters = self.adapters
        routing = RoutingCapture(
            self.model_runner, adapters.backend, adapters.slots.slot, adapters.slots.members
        )
        adapters.routing_capture = routing

        def begin_step(runs: Sequence[Run]) -> None:
            adapters.model.begin_step(runs)
            routing.begin_step(runs)

        vocabulary = adapters.vocabulary
        logits = LogitsRows(
            self.model_runner,
            model,
            vocabulary.begin_logits,
            vocabulary.hide_added if vocabulary.extra_tokens else None,
        )
        announce = begin_step
        if adapters.classified is not None:
            caches = scaling_pass.add_caches(vllm_config)
            announce_base = partial(adapters.model.begin_step, ())
            classified = adapters.classified
            later = NonGranularRows(self.model_runner, adapters.slots.slot, classified)
            announce = ScalingPass(
                model, caches, classified, later, begin_step, announce_base
            ).begin_step
        tokens = TokenRows(model, adapters.slots, announce)
        manager = LoRAManager(adapters, activated, routing, logits, tokens)
        self.model_runner.lora_manager = manager
        return model

    # What `molehill.engine.vllm.protocol` asks, in plain values and answered in them

    def molehill_describe(self, request: object) -> object:
        return protocol.DESCRIBE.serve(request, self.adapters.describe)

    def molehill_cores(self, request: object) -> object:
        return protocol.CORES.serve(
            request, lambda _: protocol.CoresReply(tuple(sorted(affinity())))
        )

    def molehill_prepare(self, request: object) -> object:
        return protocol.PREPARE.serve(request, self.adapters.prepare)

    def molehill_prepared(self, request: object) -> object:
        return protocol.PREPARED.serve(request, self.adapters.prepared)

    def molehill_discard(self, request: object) -> object:
        return protocol.DISCARD.serve(request, self.adapters.discard)

    def molehill_install(self, request: object) -> object:
        return protocol.INSTALL.serve(request, self.adapters.install)

    def molehill_uninstall(self, request: object) -> object:
        return protocol.UNINSTALL.serve(request, self.adapters.uninstall)

    def molehill_stats(self, request: object) -> object:
        timer = self.step_timer
        seconds = protocol.StepSeconds(timer.steps, timer.ops) if timer else None
        return protocol.STATS.serve(request, lambda asked: self.adapters.report(asked, seconds))

    def molehill_routing(self, request: object) -> object:
        return protocol.ROUTING.serve(request, self.adapters.routing)

    def molehill_routes(self, request: object) -> object:
        return protocol.ROUTES.serve(request, self.adapters.routes)

    def molehill_forget_routes(self, request: object) -> object:
        return protocol.FORGET_ROUTES.serve(request, self.adapters.forget_routes)

    def molehill_trace(self, request: object) -> object:
        return protocol.TRACE.serve(request, self.adapters.trace)
