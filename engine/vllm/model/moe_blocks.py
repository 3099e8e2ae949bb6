"""The MoE blocks of a loaded vLLM model: which of them adapters can change, and their weights.

The seam is `RoutedExperts.quant_method.apply`, after the base's router has chosen and before the
tensor-parallel sum. The CPU kernels keep weights packed in groups of 16 outputs, which a batched
GEMM reads in place (`vec`), or in pairs of inputs as well (`amx`), which are unpacked for each use.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

from molehill.engine.adapter.base_model import Moe
from molehill.engine.vllm.model.projections import canonical

# vLLM's MoEActivation values to Transformers names.
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_PLAIN, _VEC, _AMX = "plain", "vec", "amx"
_GROUP = 16


@dataclass(frozen=True)
class MoeBlock:
    """A block of routed experts: `site` is `layers.3.mlp`. intermediate: this rank's range of the
    experts' inner width. activation: its Transformers name."""

    site: str
    runner: MoERunner
    sizes: Moe
    intermediate: range
    activation: str


@contextmanager
def on_cpu_kernels(config: VllmConfig) -> Iterator[None]:
    """Loads a model as if it had no LoRA config, on CPU.

    With one, vLLM chooses its Triton MoE kernels, which its own LoRA layers need and a CPU cannot
    run. Whoever loads the adapters has the config already.
    """
    if not current_platform.is_cpu():
        yield
        return
    lora, config.lora_config = config.lora_config, None
    try:
        yield
    finally:
        config.lora_config = lora


def find_blocks(model: nn.Module) -> Iterator[tuple[str, MoERunner]]:
    """(site, runner) of every MoE block in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            yield canonical(name).removesuffix(".experts"), module


def describe(site: str, runner: MoERunner) -> MoeBlock:
    """What adapters have to fit."""
    config = runner.moe_config
    total = config.intermediate_size
    width = total // config.moe_parallel_config.tp_size
    start = config.moe_parallel_config.tp_rank * width
    return MoeBlock(
        site,
        runner,
        Moe(config.num_logical_experts, config.hidden_dim_unpadded, total),
        range(start, start + width),
        _ACTIVATIONS.get(config.activation.value, config.activation.value),
    )


def refusal(runner: MoERunner, cuda_graphs: bool) -> str | None:
    """Why adapters cannot change a block's experts; None if they can."""
    config, experts = runner.moe_config, runner.routed_experts
    parallel, method = config.moe_parallel_config, experts.quant_method
    reasons = {
        "CUDA graphs (start with --enforce-eager)": cuda_graphs,
        "expert parallelism": parallel.use_ep,
        "data parallelism over experts": parallel.dp_size > 1 or parallel.pcp_size > 1,
        "sequence parallelism": parallel.is_sequence_parallel,
        "redundant experts": config.num_experts != config.num_logical_experts,
        "experts with biases": config.has_bias,
        "experts that compute nothing": isinstance(runner.router, ZeroExpertRouter),
        "experts whose input is transformed": runner.routed_input_transform is not None,
        f"the experts' activation {config.activation.value}": (
            config.activation.value not in _ACTIVATIONS or config.swiglu_limit is not None
        ),
        "gate weights on the experts' input": experts.apply_router_weight_on_input,
        f"experts run by {type(method).__name__}": type(method) is not UnquantizedFusedMoEMethod,
    }
    result = next((f"{reason} on this server" for reason, holds in reasons.items() if holds), None)
    if result is None and _layout(method) is None:
        return f"expert weights in the layout of {method.experts_cls.__name__}"
    return result


def _layout(method: Any) -> str | None:
    """How the kernel of an unquantised block keeps its weights; None if that is unknown."""
    if method.unquantized_backend == UnquantizedMoeBackend.TRITON:
        return _PLAIN
    kernel = method.moe_kernel.fused_experts if method.moe_kernel else None
    isa = getattr(kernel, "isa", None)
    if isa not in (_VEC, _AMX) or getattr(kernel, "_use_zentorch", True):
        return None
    return isa if packs_as(isa, method.moe.in_dtype) else None


@cache
def packs_as(layout: str, dtype: torch.dtype) -> bool:
    """Whether vLLM packs a weight as this room unpacks it."""
    size = 4 * _GROUP
    weight = (torch.arange(size * size) % 251).view(1, size, size).to(dtype)
    packed = _custom_ops.cpu_prepack_moe_weight(weight, layout)
    return torch.equal(unpack(packed[0], layout), weight[0])


def unpack(weight: Tensor, layout: str) -> Tensor:
    """One expert's W `[out, in]` from what the CPU kernel keeps."""
    outputs, inputs = weight.shape
    if layout == _PLAIN:
        return weight
    if layout == _VEC:
        grouped = weight.view(outputs // _GROUP, inputs, _GROUP)
        return grouped.transpose(1, 2).reshape(outputs, inputs)
    lanes = 4 // weight.element_size()
    grouped = weight.view(outputs // _GROUP, inputs // lanes, _GROUP, lanes)
    return grouped.transpose(1, 2).reshape(outputs, inputs)


def multiply(x: Tensor, weight: Tensor, layout: str) -> Tensor:
    """x W^T `[T, out]` of one expert's packed W."""
    if layout != _VEC:
        return F.linear(x, unpack(weight, layout))
    outputs, inputs = weight.shape
    y = torch.matmul(x, weight.view(outputs // _GROUP, inputs, _GROUP))
    return y.transpose(0, 1).reshape(len(x), outputs)


class MoeBlockWeights:
    """molehill.kernels.interface.BaseExperts on what vLLM's kernel multiplies by."""

    def __init__(self, block: MoeBlock) -> None:
        self._experts: Any = block.runner.routed_experts
        self._layout = _layout(self._experts.quant_method)
        self._width = len(block.intermediate)

    def gate_up(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self._layout is not None
        y = multiply(x, self._experts.w13_weight[expert], self._layout)
        gate, up = y.chunk(2, dim=1)
        return gate[:, : self._width], up[:, : self._width]

    def down(self, expert: int, h: Tensor) -> Tensor:
        assert self._layout is not None
        weight = self._experts.w2_weight[expert]
        padding = weight.shape[1] - h.shape[1]
        return multiply(F.pad(h, (0, padding)) if padding else h, weight, self._layout)


def kernel(block: MoeBlock) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """vLLM's own kernel of a block: y of x, gate weights and chosen experts. Taken before the
    block is hooked."""
    experts: Any = block.runner.routed_experts
    method = experts.quant_method

    def run(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y: Tensor = method.apply(experts, x, weights, chosen, None, None)
        return y

    return run
