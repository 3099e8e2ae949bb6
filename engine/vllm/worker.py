"""The workers that vLLM runs when it is given `worker_cls="molehill.engine.vllm.worker.Worker"`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from molehill.engine.system import startup
from molehill.engine.system.cpu_affinity import own_cores
from molehill.engine.transform.merge import MergedBase
from molehill.engine.vllm import compat, compilation, precision
from molehill.engine.vllm.host_cache import AdapterKey
from molehill.engine.vllm.lora_manager import LoRAManager
from molehill.engine.vllm.model import moe_blocks
from molehill.engine.vllm.settings import Settings
from molehill.engine.vllm.step_timer import StepTimer
from molehill.engine.vllm.worker_adapters import WorkerAdapters

compat.check_version()

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
        self.model_runner.load_lora_model = self._load_lora_model

    def load_model(self, **kwargs: Any) -> None:
        startup.enter("loading the base model")
        self._merged_base = self._install_merged_base()
        with moe_blocks.on_cpu_kernels(self.vllm_config):
            super().load_model(**kwargs)
        if not isinstance(getattr(self.model_runner, "lora_manager", None), LoRAManager):
            raise RuntimeError("vLLM did not install molehill's LoRA manager")
        if self.adapters.backend.seconds() is not None:
            self.step_timer = StepTimer(self.model_runner, self.adapters.backend.seconds)

    def _install_merged_base(self) -> MergedBase | None:
        # Imports vLLM's loaders, which must not be before the platform's worker is set up.
        from molehill.engine.vllm.model import merged_base_loader

        settings = Settings.from_config(self.vllm_config.additional_config)
        directory = None if settings.merged_base is None else Path(settings.merged_base)
        return merged_base_loader.install(
            self.vllm_config, directory, settings.merged_base_digest, settings.limits
        )

    def determine_available_memory(self) -> int:
        """Runs the model for the first time, which compiles it."""
        with compilation.announced(self.vllm_config):
            available: int = super().determine_available_memory()
        startup.enter("setting up the KV cache")
        return available

    def _load_lora_model(
        self, model: nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> nn.Module:
        self.adapters = WorkerAdapters(vllm_config, device, model, self._merged_base)
        self.model_runner.lora_manager = LoRAManager(self.adapters)
        return model

    def molehill_describe(self) -> dict[str, Any]:
        """The base model's shapes, as a dict of BaseModel's fields."""
        return self.adapters.describe()

    def molehill_cores(self) -> list[int]:
        """What this worker computes on, of this machine."""
        return sorted(own_cores())

    def molehill_stats(self, known: list[int]) -> dict[str, Any]:
        """See WorkerAdapters.report; and seconds in `steps` and in adapter `ops`, or None.

        known: `lora_int_id`s that the API may ask for again.
        """
        seconds = self.step_timer and {"steps": self.step_timer.steps, "ops": self.step_timer.ops}
        ops = self.step_timer.ops if self.step_timer else 0.0
        return {**self.adapters.report(known, ops), "seconds": seconds}

    def molehill_routing(self, lora_int_id: int) -> dict[str, Any]:
        """See WorkerAdapters.routing."""
        return self.adapters.routing(lora_int_id)

    def molehill_prepare(self, lora_int_id: int, path: str) -> bool:
        """Starts to read an adapter of the store, beside the steps; False if it is in host memory,
        ready."""
        return self.adapters.prepare(AdapterKey(lora_int_id, path))

    def molehill_prepared(self, lora_int_id: int, path: str) -> bool:
        """Whether it is read, or was refused, which `molehill_install` then says."""
        return self.adapters.is_prepared(AdapterKey(lora_int_id, path))

    def molehill_discard(self, lora_int_id: int, path: str) -> None:
        """Lets go of an adapter that was prepared and is not waited for any more."""
        self.adapters.discard(AdapterKey(lora_int_id, path))

    def molehill_install(self, name: str, lora_int_id: int, path: str) -> dict[str, Any]:
        """Copies a prepared adapter into a slot; see WorkerAdapters.install."""
        return self.adapters.install(name, AdapterKey(lora_int_id, path))

    def molehill_remove(self, lora_int_id: int, path: str, keep: bool) -> list[int]:
        """Frees an adapter's slot, if it has one. keep: it may come back, from host memory.

        Returns the ids of what had to leave host memory since the last call.
        """
        return self.adapters.uninstall(AdapterKey(lora_int_id, path), keep)

    def molehill_trace(self, enabled: bool) -> list[tuple[str, list[Any], list[Any], list[Any]]]:
        """Starts or ends recording; returns (site, probabilities, weights, entropies) so far."""
        return [
            (t.site, t.probabilities.tolist(), t.weights.tolist(), t.entropy.tolist())
            for t in self.adapters.backend.trace(enabled)
        ]
