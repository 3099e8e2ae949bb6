"""The workers that vLLM runs when it is given `worker_cls="molehill.engine.vllm.worker.Worker"`."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from molehill.engine.vllm import compat
from molehill.engine.vllm.manager import AdapterManager

compat.check_version()

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):  # type: ignore[misc]
    """vLLM's worker with molehill's adapter manager in place of the LoRA manager.

    Methods named `molehill_*` are reached with `collective_rpc`.
    """

    adapters: AdapterManager

    def init_device(self) -> None:
        super().init_device()
        compat.check_seams()
        if self.vllm_config.lora_config is None:
            raise RuntimeError("molehill's worker needs enable_lora=True (--enable-lora)")
        self.model_runner.load_lora_model = self._load_lora_model

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if not isinstance(getattr(self.model_runner, "lora_manager", None), AdapterManager):
            raise RuntimeError("vLLM did not install molehill's adapter manager")

    def _load_lora_model(
        self, model: nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> nn.Module:
        self.adapters = AdapterManager(vllm_config, device, model)
        self.model_runner.lora_manager = self.adapters
        return model

    def molehill_describe(self) -> dict[str, Any]:
        """The base model's shapes, as a dict of BaseModel's fields."""
        return self.adapters.describe()

    def molehill_stats(self) -> dict[int, dict[str, Any]]:
        """Routing figures (SlotCounters as a dict) and `bytes` by `lora_int_id`."""
        return self.adapters.stats()

    def molehill_prepare(self, path: str) -> None:
        """Starts to read and check an adapter of the store, beside the steps."""
        self.adapters.preparation.start(path)

    def molehill_prepared(self, path: str) -> bool:
        """Whether it is read, or was refused, which `molehill_install` then says."""
        return self.adapters.preparation.done(path)

    def molehill_install(self, name: str, lora_int_id: int, path: str) -> dict[str, Any]:
        """Copies a prepared adapter into a slot; see AdapterManager.install."""
        return self.adapters.install(LoRARequest(name, lora_int_id, path))

    def molehill_remove(self, lora_int_id: int) -> dict[int, dict[str, Any]]:
        """Frees an adapter's slot; its last figures, as in `molehill_stats`."""
        figures = self.adapters.stats()
        self.adapters.remove_adapter(lora_int_id)
        return {lora_int_id: figures[lora_int_id]} if lora_int_id in figures else {}

    def molehill_trace(self, enabled: bool) -> list[tuple[str, list[Any], list[Any], list[Any]]]:
        """Starts or ends recording; returns (site, probabilities, weights, entropies) so far."""
        return [
            (t.site, t.probabilities.tolist(), t.weights.tolist(), t.entropy.tolist())
            for t in self.adapters.backend.trace(enabled)
        ]
