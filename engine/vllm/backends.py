"""Chooses the backend of a worker."""

import torch
from vllm.config import VllmConfig

from molehill.engine.vllm.settings import Settings
from molehill.kernels.cpu.backend import CpuBackend
from molehill.kernels.cpu.build import BuildError
from molehill.kernels.interface import Backend
from molehill.kernels.pytorch.backend import TorchBackend

NAMES = ("auto", "cpu", "torch", "triton")

# Router rows of one adapter on one linear where gate weights are kept for all of a step's rows.
CAPTURED_GATES = 128


def for_worker(config: VllmConfig, settings: Settings, device: torch.device) -> tuple[Backend, str]:
    """The backend of `settings`, for `auto` the fastest that runs on `device`; and why this one.

    Raises ValueError for a backend that does not exist or cannot serve this configuration,
    BuildError for one that was asked for by name and cannot be built.
    """
    if settings.backend not in NAMES:
        raise ValueError(f"backend: found {settings.backend!r}, expected one of {NAMES}")
    if device.type == "cpu":
        return on_cpu(settings.backend)
    return _on_gpu(config, settings, device)


def on_cpu(name: str) -> tuple[Backend, str]:
    """As `for_worker`, on a CPU."""
    if name == "triton":
        raise ValueError("backend: found 'triton' on a CPU, expected one of auto, cpu, torch")
    if name == "torch":
        return TorchBackend(), "as asked for"
    try:
        backend = CpuBackend()
    except BuildError as error:
        if name == "cpu":
            raise
        return TorchBackend(), f"the C++ kernels are not available: {error}"
    return backend, f"C++ kernels for {backend.isa}"


def longest_step(config: VllmConfig) -> int:
    """Tokens that a step, captured or not, has at most."""
    tokens: int = max(
        config.scheduler_config.max_num_batched_tokens,
        config.compilation_config.max_cudagraph_capture_size or 0,
    )
    return tokens


def _on_gpu(config: VllmConfig, settings: Settings, device: torch.device) -> tuple[Backend, str]:
    from molehill.kernels.triton.backend import TritonBackend
    from molehill.kernels.triton.launch_config import Capacity

    if settings.backend == "cpu":
        raise ValueError(f"backend: found 'cpu' on {device}, expected one of auto, torch, triton")
    if settings.backend == "torch":
        if not config.model_config.enforce_eager:
            # A replayed graph would skip the Python that applies the adapters.
            raise ValueError("backend: found 'torch' with CUDA graphs, expected --enforce-eager")
        return TorchBackend(), "as asked for"
    tokens, lora = longest_step(config), config.lora_config
    # With an adapter in the base weights, the base's rows take a slot as well.
    adapters = lora.max_loras + (settings.merged_base is not None)
    capacity = Capacity(
        adapters=adapters,
        tokens=tokens,
        # What waits for its turn in a step has a slot too.
        slots=max(Capacity.slots, 4 * adapters),
        memory=settings.memory,
        vectors=config.model_config.enforce_eager,
        captures=settings.capture_routing,
        gates=CAPTURED_GATES if settings.capture_routing else Capacity.gates,
    )
    return TritonBackend(device, capacity), "Triton kernels"
