"""Puts the backend's ops into a vLLM model: after each linear's GEMM and each FFN's activation, and
around each MoE block's kernel.

The base GEMMs run as before and exactly once. A linear is hooked through its `quant_method`, before
the tensor-parallel collectives, so modules keep their names and types.
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
    method: Any = module.quant_method
    kind: Any = type(method)
    hooked: Any = object.__new__(_hooked(kind))
    hooked.__dict__ = method.__dict__
    module.molehill_op = op
    module.molehill_handle = torch.tensor([handle], device="cpu")
    module.requires_unquantized_input = True
    module.quant_method = hooked


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
    method = experts.quant_method
    kind: Any = type(method)
    hooked: Any = object.__new__(_hooked_experts(kind))
    hooked.__dict__ = method.__dict__
    experts.molehill_op = op
    experts.molehill_handle = torch.tensor([handle], device="cpu")
    experts.quant_method = hooked


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


def hook_ffn(ffn: Ffn, handle: int, op: Op) -> None:
    """Replaces the FFN's activation by a MixedActivation around it."""
    activation = getattr(ffn.module, ffn.activation_child)
    setattr(ffn.module, ffn.activation_child, MixedActivation(activation, handle, op))
