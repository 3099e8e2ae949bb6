"""Puts the backend's ops into a vLLM model: after or around each linear's GEMM, after each FFN's
activation, and around each MoE block's kernel.

The base GEMMs run exactly once, by vLLM's own quant methods. A linear is hooked through its
`quant_method`, before the tensor-parallel collectives, so modules keep their names and types.
"""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase

from molehill.engine.vllm.model.discovery import Ffn

Op = Callable[..., Any]


@cache
def _hooked(method: Hashable) -> type:
    """A subclass of a quant method whose `apply` also applies the mixtures."""

    parent: Any = method

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = parent.apply(self, layer, x, bias)
        layer.molehill_op(out.flatten(0, -2), x.flatten(0, -2), layer.molehill_handle)
        return out

    return type(f"Molehill{parent.__name__}", (parent,), {"apply": apply})


def hook_linear(module: LinearBase, handle: int, op: Op) -> None:
    """Runs `op(out, x, handle)` after `module`'s GEMM."""
    _hook(module, _hooked, handle, op)
    module.requires_unquantized_input = True


@cache
def _replaced(method: Hashable) -> type:
    """A subclass of a quant method whose `apply` is the op, which runs the GEMM too."""

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        width = layer.molehill_out_features
        y: Tensor = layer.molehill_op(x, bias, layer.molehill_handle, width)
        return y

    parent: Any = method
    return type(f"Molehill{parent.__name__}", (parent,), {"apply": apply})


def replace_linear(module: LinearBase, handle: int, op: Op, out_features: int) -> None:
    """Runs `op(x, bias, handle, out_features)` in place of `module`'s GEMM. out_features: on this
    rank."""
    _hook(module, _replaced, handle, op)
    module.molehill_out_features = out_features
    module.requires_unquantized_input = True


def quantises_inputs(module: LinearBase) -> bool:
    """Whether the GEMM may read its input in fewer bits: its weights have no more than eight.

    vLLM's compiler fuses that quantisation into the operation before the linear, which it could not
    see inside an op that runs the GEMM.
    """
    weight = getattr(module, "weight", None)
    return weight is not None and weight.element_size() == 1


def _hook(module: Any, subclass: Callable[[Hashable], type], handle: int, op: Op) -> None:
    method = module.quant_method
    kind: Any = type(method)
    hooked: Any = object.__new__(subclass(kind))
    hooked.__dict__ = method.__dict__
    module.molehill_op = op
    module.molehill_handle = torch.tensor([handle], device="cpu")
    module.quant_method = hooked
    if getattr(module, "_use_min_latency_gemm", False):
        # DeepSeek V3's q_a_proj and kv_a_proj: a kernel that goes round the quant method.
        module._use_min_latency_gemm = False


@cache
def _hooked_experts(method: Hashable) -> type:
    """A subclass of an MoE method whose `apply` is the op, which calls the kernel for base rows.

    Shared experts are none of its business: vLLM hands them in for kernels of expert parallelism,
    on which nothing is hooked.
    """

    def apply(
        self: Any,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> Tensor:
        out: Tensor = layer.molehill_op(x, topk_weights, topk_ids, layer.molehill_handle)
        return out

    parent: Any = method
    return type(f"Molehill{parent.__name__}", (parent,), {"apply": apply})


def hook_experts(experts: Any, handle: int, op: Op) -> None:
    """Runs `op(x, weights, chosen, handle)` in place of the kernel of a vLLM RoutedExperts."""
    _hook(experts, _hooked_experts, handle, op)


class MixedActivation(nn.Module):
    """An FFN's activation, whose rows of FFN mixtures `op(h, gate_up, handle)` then overwrites."""

    def __init__(self, activation: nn.Module, handle: int, op: Op) -> None:
        super().__init__()
        self.activation = activation
        self.op = op
        self.handle = torch.tensor([handle], device="cpu")

    def forward(self, gate_up: Tensor) -> Tensor:
        h: Tensor = self.activation(gate_up)
        self.op(h.flatten(0, -2), gate_up.flatten(0, -2), self.handle)
        return h


class ReplacedActivation(nn.Module):
    """What stands in an FFN for its activation: h is `op(gate_up, handle)`."""

    def __init__(self, handle: int, op: Op) -> None:
        super().__init__()
        self.op = op
        self.handle = torch.tensor([handle], device="cpu")

    def forward(self, gate_up: Tensor) -> Tensor:
        h: Tensor = self.op(gate_up, self.handle)
        return h


def replace_activation(ffn: Ffn, handle: int, op: Op) -> None:
    """Runs `op(gate_up, handle)` in place of the FFN's activation."""
    setattr(ffn.module, ffn.activation_child, ReplacedActivation(handle, op))


def hook_ffn(ffn: Ffn, handle: int, op: Op) -> None:
    """Replaces the FFN's activation by a MixedActivation around it."""
    activation = getattr(ffn.module, ffn.activation_child)
    setattr(ffn.module, ffn.activation_child, MixedActivation(activation, handle, op))
