"""Quantised bases on CPU: what vLLM's kernels ask of the processor."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_X86 = ("x86_64", "amd64")
_INT4, _INT8 = 4, 8


@dataclass(frozen=True)
class Quantisation:
    """method: as checkpoints name it. bits: of the weights, integers. rounds_inputs: whether their
    GEMM reads int8."""

    method: str
    bits: int
    rounds_inputs: bool


def has_int4_kernel() -> bool:
    """Whether vLLM's CPU build has its GEMM of 4-bit weights (cpu_gemm_wna16) on this processor:
    on x86 it is in the builds for AVX-512 only."""
    return not _is_x86() or bool(torch.cpu._is_avx512_supported())


def int8_sums_overflow() -> bool:
    """Whether oneDNN adds two products of int8 in 16 bits on this processor, which overflow where
    weights and inputs are large ("Nuances of int8 Computations" in oneDNN's guide)."""
    has = torch.cpu.get_capabilities()
    return _is_x86() and not (has.get("avx512_vnni") or has.get("avx_vnni"))


def _is_x86() -> bool:
    return platform.machine().lower() in _X86


def check(config: Any) -> None:
    """Raises ValueError where vLLM's CPU kernels would fail at the first request.

    config: Transformers'.
    """
    found = quantisation(config)
    if found is not None and found.bits == _INT4 and not has_int4_kernel():
        raise ValueError(
            f"quantization_config: found {found.method} with weights of 4 bits, expected 8 bits or "
            "none: vLLM's CPU kernel for 4 bits needs AVX-512, which this processor does not have"
        )


def warning(config: Any) -> str:
    """Where vLLM's CPU kernels are inexact here, in a sentence; empty where they are not."""
    found = quantisation(config)
    if found is None or not (found.rounds_inputs and found.bits == _INT8 and int8_sums_overflow()):
        return ""
    return (
        f"{found.method} with weights and inputs in int8: without VNNI, which this processor does "
        "not have, oneDNN adds two products in 16 bits; where they overflow, answers are wrong, "
        "the base model's and plain vLLM's too"
    )


def quantisation(config: Any) -> Quantisation | None:
    """Of a Transformers config; None of an unquantised one and of methods with other numbers."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    fields: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = fields.get("quant_method")
    if method in ("awq", "gptq"):
        return Quantisation(method, int(fields.get("bits") or fields.get("w_bit") or _INT4), False)
    return _compressed(fields) if method == "compressed-tensors" else None


def _compressed(fields: Mapping[str, Any]) -> Quantisation | None:
    """Of several groups, those of the fewest bits."""
    groups = [group for group in (fields.get("config_groups") or {}).values() if group]
    weights = [group.get("weights") or {} for group in groups]
    bits = [int(w["num_bits"]) for w in weights if w.get("type") == "int" and w.get("num_bits")]
    if not bits:
        return None
    inputs = [group.get("input_activations") or {} for group in groups]
    rounds = any((i.get("type"), i.get("num_bits")) == ("int", _INT8) for i in inputs)
    return Quantisation("compressed-tensors", min(bits), rounds)
