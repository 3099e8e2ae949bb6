"""The weights that vLLM's CPU kernels pack, read back: against vLLM's own packing and kernel."""

import pytest
import torch
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    UnquantizedMoeBackend,
    backend_to_kernel_cls,
    select_unquantized_moe_backend,
)

from molehill.engine.vllm.model.moe_blocks import multiply, packs_as, unpack
from molehill.kernels.activation import SWIGLUOAI
from molehill.kernels.reference import moe_experts

LAYOUTS = [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def chosen(dtype: torch.dtype) -> str:
    """The layout of the kernel that vLLM takes on this processor for experts of a usual shape."""
    config = FusedMoEConfig(
        num_experts=4,
        num_logical_experts=4,
        num_local_experts=4,
        experts_per_token=2,
        hidden_dim=64,
        intermediate_size=96,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
    )
    _, kernel = select_unquantized_moe_backend(config)
    assert kernel is not None
    return str(kernel.isa)


def usable() -> set[str]:
    """Layouts whose kernels, as vLLM says, run on this processor. Others' packing is undefined."""
    kernels = backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
    return {kernel.isa for kernel in kernels if kernel._supports_current_device()}


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in usable():
        pytest.skip(f"vLLM has no kernel of the layout {name} for this processor: {usable()}")
    return name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_that_vllm_chooses_here_is_tested_here(dtype: torch.dtype) -> None:
    assert (chosen(dtype), dtype) in LAYOUTS
    assert chosen(dtype) in usable()


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, indirect=["layout"])
def test_the_layout_is_known(layout: str, dtype: torch.dtype) -> None:
    assert packs_as(layout, dtype)


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, indirect=["layout"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_a_packed_weight_multiplies_as_the_plain_one(
    layout: str, dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(tokens)
    weight = (torch.randn(3, 96, 64) / 8).to(dtype)
    x = torch.randn(tokens, 64).to(dtype)
    packed = _custom_ops.cpu_prepack_moe_weight(weight, layout)
    assert not torch.equal(packed, weight)
    for expert in range(3):
        assert torch.equal(unpack(packed[expert], layout), weight[expert])
        result = multiply(x, packed[expert], layout).float()
        expected = x.float() @ weight[expert].float().T
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE[dtype])


def test_another_packing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packs_as.cache_clear()
    monkeypatch.setattr(_custom_ops, "cpu_prepack_moe_weight", lambda weight, isa: weight.clone())
    assert not packs_as("vec", torch.float32)
    packs_as.cache_clear()


def test_gpt_oss_activation_and_biases_are_those_of_vllms_kernel() -> None:
    """Gate and up in turn, and values that both limits cut."""
    torch.manual_seed(4)
    tokens, experts, hidden, inner = 9, 4, 64, 32
    w13, w2 = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner) / 8
    b13, b2 = torch.randn(experts, 2 * inner), torch.randn(experts, hidden)
    x = torch.randn(tokens, hidden)
    weights, chosen = torch.randn(tokens, experts).softmax(-1).topk(2)
    packed = [_custom_ops.cpu_prepack_moe_weight(weight, "vec") for weight in (w13, w2)]
    y, ids = torch.empty(tokens, hidden), chosen.int()
    _custom_ops.cpu_fused_moe(y, x, *packed, b13, b2, weights, ids, SWIGLUOAI, "vec", False)
    gate_up = torch.einsum("td,eod->teo", x, w13) + b13
    assert gate_up.max() > 7
    assert gate_up.min() < -7
    gate_up, biases = (torch.cat([t[:, ::2], t[:, 1::2]], dim=1) for t in (w13, b13))
    expected = moe_experts(x, weights, chosen, gate_up, w2, SWIGLUOAI, {}, biases, b2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
