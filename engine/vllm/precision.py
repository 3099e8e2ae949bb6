"""The dtype that a base model is computed in on CPU: what it must be, and what is fast.

vLLM's `auto` takes 16 bits whatever the checkpoint has. oneDNN multiplies bfloat16 with AVX-512,
AVX-NE-CONVERT or, on ARM, the bf16 extension; elsewhere vLLM falls back to torch's own loops, which
read prompts several times slower than float32.
"""

import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "bfloat16"

# Measured on two AVX2 cores; the table, and how to measure again, is in docs/operations.md.
GAIN = (
    "SmolLM2-135M read prompts 5.2 times as fast in it, and decoded one stream at 0.93 times the "
    "speed"
)

_GIB = 1 << 30
_ITEM = 4
# The architectures on which bfloat16 in oneDNN was looked at; elsewhere vLLM's choice stands.
_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
# Its gated delta net is another one, for GPUs only.
_OTHER_DELTA_NETS = ("olmo_hybrid",)
# Widths of their heads for which vLLM 0.32 has CPU kernels.
_DELTA_NET_HEADS = (64, 128)


@dataclass(frozen=True)
class Room:
    """Bytes. available: for weights and KV cache. cache: the KV cache of all workers; 0 where it is
    what the weights leave.

    tokens: the longest request, whose KV cache must fit; 0 where vLLM fits the length itself.
    """

    available: int
    cache: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """A dtype as `--dtype` takes it, and a sentence that says why, where there is one to say."""

    dtype: str
    why: str = ""


def has_fast_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    if platform.machine().lower() not in _MACHINES or sys.platform == "darwin":
        return True
    if not torch.backends.mkldnn.is_available():
        return True
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def needs_bfloat16(config: Any) -> bool:
    """Whether a Transformers config has layers that vLLM's CPU kernels run in bfloat16 only: the
    gated delta nets of Qwen3-Next, Qwen3.5 and what has their layers."""
    text = config.get_text_config()
    is_linear = "linear_attention" in (getattr(text, "layer_types", None) or ())
    is_delta_net = is_linear and getattr(text, "linear_num_value_heads", None) is not None
    return is_delta_net and text.model_type not in _OTHER_DELTA_NETS


def check(config: Any, dtype: str) -> None:
    """Raises ValueError where vLLM's CPU kernels would fail at the first request.

    dtype: as `--dtype` takes it.
    """
    if needs_bfloat16(config) and dtype not in (AUTO, BFLOAT16):
        kind = config.get_text_config().model_type
        raise ValueError(
            f"--dtype: found {dtype}, expected bfloat16: vLLM's CPU kernels for the gated delta "
            f"net of {kind} take nothing else"
        )
    if needs_bfloat16(config):
        _check_heads(config.get_text_config())


def _check_heads(text: Any) -> None:
    widths = (text.linear_key_head_dim, text.linear_value_head_dim)
    if widths not in [(width, width) for width in _DELTA_NET_HEADS]:
        raise ValueError(
            f"linear_key_head_dim, linear_value_head_dim: found {widths[0]}, {widths[1]}, expected "
            f"both {' or both '.join(map(str, _DELTA_NET_HEADS))}: vLLM's CPU kernels for the "
            f"gated delta net of {text.model_type} take nothing else"
        )


def choose(config: Any, parameters: Callable[[], int], room: Callable[[], Room]) -> Choice:
    """What `auto` becomes on a CPU.

    parameters: how many the checkpoint has, 0 where nobody knows. Both are called where it matters.
    """
    if needs_bfloat16(config):
        return Choice(BFLOAT16)
    if has_fast_bfloat16() or is_quantized(config):
        return Choice(AUTO)
    return _float32_if_it_fits(config, parameters() * _ITEM, room())


def _float32_if_it_fits(config: Any, weights: int, room: Room) -> Choice:
    if not weights:
        return Choice(AUTO, _stays("the size of the checkpoint is not known"))
    longest = room.tokens * cache_bytes(config)
    if 0 < room.cache < longest:
        what = f"a request of {room.tokens} tokens takes {_gib(longest)} of KV cache in float32"
        return Choice(AUTO, _stays(f"{what}, {_gib(room.cache)} are given"))
    cache = room.cache or longest
    if weights + cache > room.available:
        what = f"weights and KV cache take {_gib(weights + cache)} in float32"
        return Choice(AUTO, _stays(f"{what}, {_gib(room.available)} are free"))
    return Choice(
        FLOAT32,
        "dtype: float32 in place of 16 bits, which oneDNN does not multiply on this processor; "
        f"{GAIN}. The weights take {_gib(weights)}, and weights and KV cache twice as much memory "
        "as in 16 bits. --dtype bfloat16 takes these all the same.",
    )


def _stays(why: str) -> str:
    return (
        "dtype: 16 bits, which oneDNN does not multiply on this processor; float32 would read "
        f"prompts faster ({GAIN}), but {why}. --dtype float32 takes it all the same."
    )


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint is: its kernels have their own ideas of dtypes."""
    texts = (config, config.get_text_config())
    names = ("quantization_config", "compression_config")
    return any(getattr(text, name, None) for text in texts for name in names)


def cache_bytes(config: Any) -> int:
    """Of a token's keys and values in float32, in all layers; more than there are where some keep
    a window, a state or a latent only. 0 where the config does not have the usual names."""
    text = config.get_text_config()
    layers, hidden, heads = (
        getattr(text, name, None)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not (layers and hidden and heads):
        return 0
    width = getattr(text, "head_dim", None) or hidden // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * layers * kept * width * _ITEM)


def count_parameters(model: str, revision: str | None) -> int:
    """Of a directory, the local cache or the hub, from the headers of its safetensors files."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    # Of a local file there is `__metadata__` beside the tensors.
    entries = get_safetensors_params_metadata(model, revision=revision).values()
    return sum(math.prod(entry["shape"]) for entry in entries if "shape" in entry)


def memory() -> tuple[int, int]:
    """Bytes that are free on the memory nodes that vLLM uses, and that they have."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    nodes = [get_memory_node_info(node) for node in get_visible_memory_node() or [0]]
    return sum(n.available_memory for n in nodes), sum(n.total_memory for n in nodes)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
