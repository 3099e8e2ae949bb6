"""W of vLLM's linears, read through their own GEMMs, beside what was put into them."""

from typing import Any

import pytest
import torch
from support.backend_cases import random
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from molehill.engine.vllm.model import hooks, layer_weight
from molehill.engine.vllm.model.discovery import Linear
from molehill.engine.vllm.model.projections import Projection

INPUTS, OUT = 64, 32
# Of weights in int8: on x86 without VNNI oneDNN adds two products in 16 bits.
MOST = 63
# Of the largest weight: float32 products of int8 numbers and their scales.
ROUNDING = 1e-6


def read(layer: ReplicatedLinear) -> Tensor:
    """As a worker does, of a hooked layer."""
    layer.quant_method.process_weights_after_loading(layer)
    hooks.hook_linear(layer, 0, lambda *_: pytest.fail("the mixture is no part of W"))
    part = Projection("q", INPUTS, OUT, (range(OUT),), range(INPUTS), 0)
    return layer_weight.read(Linear("q", layer, (part,)))


def int8(**activations: Any) -> ReplicatedLinear:
    """A layer that rounds its inputs to int8 as these arguments say."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {"num_bits": 8, "type": "int", **activations},
    }
    config = CompressedTensorsConfig.from_config(
        {"format": "int-quantized", "config_groups": {"group_0": group}}
    )
    return ReplicatedLinear(
        INPUTS, OUT, False, params_dtype=torch.float32, quant_config=config, prefix="q"
    )


def fill(layer: Any) -> Tensor:
    """Its weights in int8, their scales; W, as they say it."""
    w = random(OUT, INPUTS, scale=INPUTS**-0.5)
    scale = w.abs().amax(1, keepdim=True) / MOST
    layer.weight.data.copy_((w / scale).round())
    layer.weight_scale.data.copy_(scale)
    return layer.weight.data.float() * scale


def assert_read(layer: Any, w: Tensor) -> None:
    assert (read(layer) - w).abs().max() <= ROUNDING * w.abs().max()


def test_a_float_weight(one_rank: None) -> None:
    layer = ReplicatedLinear(INPUTS, OUT, False, params_dtype=torch.float32)
    w = random(OUT, INPUTS, scale=INPUTS**-0.5)
    layer.weight.data.copy_(w)
    assert_read(layer, w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_rounded_by_the_row(one_rank: None, symmetric: bool) -> None:
    if not ops._supports_onednn:
        pytest.skip("vLLM has no int8 GEMM on this processor")
    layer = int8(strategy="token", dynamic=True, symmetric=symmetric)
    assert_read(layer, fill(layer))


# The middle one ends at 1/3, where a 1 would be cut off; the steps of the others miss 1.
@pytest.mark.parametrize("scale", [0.026, 1 / 381, 0.3])
@pytest.mark.parametrize("zero", [None, 90, -90])
def test_inputs_rounded_by_a_fixed_scale(one_rank: None, scale: float, zero: int | None) -> None:
    if not ops._supports_onednn:
        pytest.skip("vLLM has no int8 GEMM on this processor")
    layer: Any = int8(strategy="tensor", dynamic=False, symmetric=zero is None)
    w = fill(layer)
    layer.input_scale.data.fill_(scale)
    if zero is not None:
        layer.input_zero_point.data.fill_(zero)
    assert_read(layer, w)
