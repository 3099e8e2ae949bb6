"""The dtype that is chosen and refused on CPU, beside vLLM, oneDNN and Transformers."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.golden import TINY_LLAMA, VOCABULARY
from transformers import AutoConfig

from molehill.api.cli import main
from molehill.api.vllm import launcher
from molehill.api.vllm import precision as api_precision
from molehill.engine.vllm import precision
from molehill.engine.vllm.precision import Choice, Room

GIB = 1 << 30
PLENTY = Room(available=64 * GIB, cache=4 * GIB, tokens=512)


def config(model_type: str, **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**tiny_models.SIZES, **changes})


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bfloat16, which this machine need not be."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)


def choose(config: Any, parameters: int = 1000, room: Room = PLENTY) -> Choice:
    return precision.choose(config, lambda: parameters, lambda: room)


def test_fast_is_what_onednn_in_vllm_multiplies() -> None:
    from vllm import _custom_ops as ops

    if not ops._supports_onednn:
        pytest.skip("vLLM has no oneDNN on this processor")
    try:
        ops.create_onednn_mm(torch.zeros(64, 64, dtype=torch.bfloat16).t(), 32)
    except RuntimeError:
        assert not precision.has_fast_bfloat16()
    else:
        assert precision.has_fast_bfloat16()


@pytest.mark.parametrize(
    ("model_type", "needs"),
    [
        ("qwen3_next", True),
        ("qwen3_5_text", True),
        ("qwen3_5_moe_text", True),
        ("olmo_hybrid", False),
        ("minimax", False),
        ("qwen3", False),
        ("llama", False),
    ],
)
def test_gated_delta_nets_need_bfloat16(model_type: str, needs: bool) -> None:
    assert precision.needs_bfloat16(config(model_type)) is needs


def test_a_multimodal_config_is_judged_by_its_text() -> None:
    assert precision.needs_bfloat16(AutoConfig.for_model("qwen3_5"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "half"])
def test_other_dtypes_of_gated_delta_nets_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"found {dtype}, expected bfloat16: .* of qwen3_next"):
        precision.check(config("qwen3_next"), dtype)
    precision.check(config("llama"), dtype)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bfloat16_of_gated_delta_nets_is_not(dtype: str) -> None:
    precision.check(config("qwen3_next"), dtype)


@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_the_widths_of_heads_are_those_of_vllms_kernel(width: int) -> None:
    from vllm import _custom_ops as ops

    head = torch.randn(1, 4, 1, width).bfloat16()
    gates = torch.randn(4, 1).bfloat16()
    g, beta = ops.fused_gdn_gating_cpu(torch.ones(1), gates, gates, torch.ones(1).bfloat16())
    heads = {"linear_key_head_dim": width, "linear_value_head_dim": width}
    try:
        ops.chunk_gated_delta_rule_cpu(
            query=head,
            key=head,
            value=head,
            g=g,
            beta=beta,
            initial_state=torch.zeros(1, 1, width, width),
            output_final_state=True,
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
            head_first=False,
            use_qk_l2norm_in_kernel=True,
            initial_state_indices=torch.zeros(1, dtype=torch.int32),
        )
    except RuntimeError:
        with pytest.raises(ValueError, match=rf"found {width}, {width}, expected both 64 or both"):
            precision.check(config("qwen3_next", **heads), "bfloat16")
    else:
        precision.check(config("qwen3_next", **heads), "bfloat16")


def test_float32_where_bfloat16_is_slow_and_why(slow: None) -> None:
    choice = choose(config("llama"), parameters=135 * 10**6)
    assert choice.dtype == "float32"
    assert "oneDNN does not multiply on this processor" in choice.why
    assert "weights take 0.5 GiB" in choice.why
    assert "--dtype bfloat16" in choice.why


def test_vllms_choice_stands_where_bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    assert choose(config("llama")) == Choice("auto")


def test_gated_delta_nets_keep_bfloat16(slow: None) -> None:
    assert choose(config("qwen3_next", dtype="float16")) == Choice("bfloat16")


def test_a_quantised_checkpoint_is_left_to_vllm(slow: None) -> None:
    quantised = config("llama", quantization_config={"quant_method": "awq", "bits": 4})
    assert choose(quantised) == Choice("auto")


@pytest.mark.parametrize(
    ("parameters", "room", "why"),
    [
        (0, PLENTY, "size of the checkpoint is not known"),
        (8 * 10**9, Room(32 * GIB, 4 * GIB, 512), "take 33.8 GiB in float32, 32.0 GiB are free"),
        (1000, Room(64 * GIB, GIB, 1 << 21), "2097152 tokens takes 2.0 GiB of KV cache"),
        (1000, Room(GIB, 0, 1 << 21), "weights and KV cache take 2.0 GiB in float32"),
    ],
)
def test_float32_that_does_not_fit_is_not_chosen(
    slow: None, parameters: int, room: Room, why: str
) -> None:
    choice = choose(config("llama", head_dim=32), parameters, room)
    assert choice.dtype == "auto"
    assert why in choice.why
    assert "--dtype float32 takes it all the same" in choice.why


def test_the_cache_is_as_large_as_transformers_makes_it() -> None:
    model = tiny_models.load(TINY_LLAMA)
    with torch.inference_mode():
        cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert precision.cache_bytes(model.config) == kept / 10


def test_parameters_are_those_of_the_file() -> None:
    model = tiny_models.load(TINY_LLAMA)
    assert precision.count_parameters(str(TINY_LLAMA), None) == model.num_parameters()


@pytest.fixture
def vllm_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what the launcher writes is undone.
    monkeypatch.setenv("VLLM_PLUGINS", launcher.allow_plugin(None))
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "128")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def chosen_dtype(*arguments: str) -> str:
    args = launcher.parse([str(TINY_LLAMA), *arguments])
    api_precision.choose_dtype(args)
    dtype: str = args.dtype
    return dtype


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile. vLLM takes handlers away when it sets up its logging, and its own
    writes to the stdout of whichever test imported it; a filter stays."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.molehill")
    logger.addFilter(keep)
    yield lines
    logger.removeFilter(keep)


def test_a_server_without_a_dtype_gets_the_fast_one_and_one_line(
    vllm_environment: None, slow: None, logged: list[str]
) -> None:
    assert chosen_dtype() == "float32"
    assert chosen_dtype("--dtype", "auto") == "float32"
    lines = [line for line in logged if line.startswith("dtype: ")]
    assert len(lines) == 2
    assert all("dtype: float32 in place of 16 bits" in line for line in lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_given_dtype_is_obeyed(vllm_environment: None, slow: None, dtype: str) -> None:
    assert chosen_dtype("--dtype", dtype) == dtype


def test_a_length_whose_cache_does_not_fit_keeps_sixteen_bits(
    vllm_environment: None, slow: None
) -> None:
    token = precision.cache_bytes(AutoConfig.from_pretrained(TINY_LLAMA))
    fits, does_not = str(128 * token), str(128 * token - 1)
    length = ("--max-model-len", "128")
    assert chosen_dtype(*length, "--kv-cache-memory-bytes", fits) == "float32"
    assert chosen_dtype(*length, "--kv-cache-memory-bytes", does_not) == "auto"
    assert chosen_dtype(*length, "--gpu-memory-utilization", "0.5") == "float32"


def test_serve_refuses_a_dtype_that_its_kernels_do_not_take(
    vllm_environment: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {**tiny_models.SIZES, **tiny_models.MODELS["qwen3_next"], "vocab_size": VOCABULARY}
    AutoConfig.for_model("qwen3_next", **sizes).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3_next"
    assert main.main(["serve", str(tmp_path), "--dtype", "float32"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "molehill serve: --dtype: found float32, expected bfloat16: vLLM's CPU kernels for the "
        "gated delta net of qwen3_next take nothing else"
    )
