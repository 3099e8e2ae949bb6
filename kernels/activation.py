"""Activations by their Transformers name, and how gated FFNs use them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
SWIGLUOAI = "swigluoai"
SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT = 1.702, 7.0


def gated(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """h of gate and up: act(gate) * up, or SWIGLUOAI. Raises KeyError for an unknown name."""
    if name == SWIGLUOAI:
        return _swigluoai
    activation = ACTIVATIONS[name]
    return lambda gate, up: activation(gate) * up


def _swigluoai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: (up + 1) * gate * sigmoid(1.702 gate), gate at most 7, up within 7 of 0.

    Of `GptOssExperts._apply_gate` in Transformers' models/gpt_oss/modeling_gpt_oss.py.
    """
    gate = gate.clamp(max=SWIGLUOAI_LIMIT)
    up = up.clamp(-SWIGLUOAI_LIMIT, SWIGLUOAI_LIMIT)
    return (up + 1) * gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate)
