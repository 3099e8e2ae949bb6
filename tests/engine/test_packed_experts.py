"""The weights that vLLM's CPU kernels pack, read back: against vLLM's own packing and kernel."""

import pytest
import torch
from vllm import _custom_ops

from molehill.engine.vllm.experts import multiply, packs_as, unpack

LAYOUTS = [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_the_layout_is_known(layout: str, dtype: torch.dtype) -> None:
    assert packs_as(layout, dtype)


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
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
        found = multiply(x, packed[expert], layout).float()
        expected = x.float() @ weight[expert].float().T
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


def test_another_packing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packs_as.cache_clear()
    monkeypatch.setattr(_custom_ops, "cpu_prepack_moe_weight", lambda weight, isa: weight.clone())
    assert not packs_as("vec", torch.float32)
    packs_as.cache_clear()
