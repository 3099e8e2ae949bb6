"""What is said of quantised bases on a processor, beside what vLLM's kernels do on this one."""

from typing import Any

import pytest
import torch
from support.quantised import SCHEMES
from transformers import AutoConfig
from vllm import _custom_ops as ops

from molehill.engine.vllm import quantisation
from molehill.engine.vllm.quantisation import Quantisation


def config(found: Any) -> Any:
    return AutoConfig.for_model("llama", quantization_config=found)


def test_4_bits_are_what_vllm_has_a_kernel_for() -> None:
    assert quantisation.has_int4_kernel() == hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.mark.skipif(not ops._supports_onednn, reason="vLLM has no int8 GEMM on this processor")
def test_sums_overflow_where_vllms_do() -> None:
    # What it is made of must live as long as it does.
    weight, scale = torch.full((32, 64), 127, dtype=torch.int8), torch.ones(32, 1)
    gemm = ops.create_onednn_scaled_mm(weight.t(), scale, torch.float32, True, False, 32)
    x, y = torch.full((1, 64), 127, dtype=torch.int8), torch.empty(1, 32)
    ops.onednn_scaled_mm(gemm, x, y, torch.ones(1, 1), None, None, None)
    assert quantisation.int8_sums_overflow() == bool((y != 64 * 127 * 127).any())


READ = {
    "int8": Quantisation("compressed-tensors", 8, True),
    "int8-fixed": Quantisation("compressed-tensors", 8, True),
    "w4a16": Quantisation("compressed-tensors", 4, False),
    "awq": Quantisation("awq", 4, False),
    "gptq": Quantisation("gptq", 4, False),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_configs_are_read_as_quantisers_write_them(name: str) -> None:
    assert quantisation.quantisation(config(dict(SCHEMES[name].config))) == READ[name]


@pytest.mark.parametrize("name", [None, "fp8", "modelopt"])
def test_other_methods_are_left_to_vllm(name: str | None) -> None:
    found = config(None if name is None else {"quant_method": name})
    assert quantisation.quantisation(found) is None
    quantisation.check(found)
    assert quantisation.warning(found) == ""


@pytest.mark.parametrize("has", [True, False])
def test_4_bits_without_a_kernel_are_refused(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors of both kinds, of which this is one."""
    monkeypatch.setattr(quantisation, "has_int4_kernel", lambda: has)
    quantisation.check(config(dict(SCHEMES["int8"].config)))
    for name in ("awq", "gptq", "w4a16"):
        found = config(dict(SCHEMES[name].config))
        if has:
            quantisation.check(found)
            continue
        with pytest.raises(
            ValueError, match=r"with weights of 4 bits, expected 8 .* needs AVX-512"
        ):
            quantisation.check(found)


@pytest.mark.parametrize("overflow", [True, False])
def test_int8_that_overflows_is_warned_of(overflow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "int8_sums_overflow", lambda: overflow)
    said = quantisation.warning(config(dict(SCHEMES["int8"].config)))
    assert ("without VNNI" in said) == overflow
    assert quantisation.warning(config(dict(SCHEMES["w4a16"].config))) == ""
