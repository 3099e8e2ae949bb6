"""Lets vLLM compile the model on CPU while adapters are enabled.

vLLM's CPU platform forces eager execution whenever a LoRA config is there, for its own LoRA layers
cannot be traced. molehill's ops are opaque to the compiler, so with molehill's worker that gate is
needless. It stands in the process that makes the engine's config, and only there.
"""

import functools
from typing import Any

WORKER = "molehill.engine.vllm.worker.Worker"


def lift_gate() -> None:
    """Hides the LoRA config from CpuPlatform's config check, for molehill's worker only."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__
    if getattr(original, "lifted_by_molehill", False):
        return

    @functools.wraps(original)
    def check(cls: type, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if vllm_config.parallel_config.worker_cls == WORKER:
            vllm_config.lora_config = None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    check.lifted_by_molehill = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check)
