"""W of a vLLM linear, whatever vLLM has packed or quantised it to."""

from typing import Any

import torch
from torch import Tensor

from molehill.engine.vllm.model.discovery import Linear

IDENTITY_ROWS = 1024


def read(linear: Linear) -> Tensor:
    """W `[out, in]` float32 on the CPU, read through the layer's own GEMM: what the layer
    multiplies by is what counts.

    Rows with one number are exact in a GEMM that rounds its inputs by a scale of each row. One that
    rounds by a fixed scale gets one step of it in place of 1, which it would round, or cut off.
    """
    module = linear.module
    parameter = next(module.parameters())
    dtype = module.params_dtype
    value = _probe(module)
    rows = []
    for start in range(0, linear.in_features, IDENTITY_ROWS):
        size = min(IDENTITY_ROWS, linear.in_features - start)
        x = torch.zeros(size, linear.in_features, dtype=dtype, device=parameter.device)
        x[:, start : start + size].fill_diagonal_(value)
        unhooked: Any = type(module.quant_method).__mro__[1]
        y = unhooked.apply(module.quant_method, module, x, None)
        rows.append(y.float().cpu() / value)
    return torch.cat(rows).T


def _probe(module: Any) -> float:
    """What the GEMM reads as it is. vLLM keeps a fixed scale as `input_scale`, and the step that
    stands for zero, where it is not 0, as `input_zero_point`."""
    scale = getattr(module, "input_scale", None)
    if scale is None or scale.numel() != 1:
        return 1.0
    zero = getattr(module, "input_zero_point", None)
    is_high = zero is not None and float(zero) > 0
    return -float(scale) if is_high else float(scale)
