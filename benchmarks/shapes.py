"""Models that are a config and no checkpoint: their weights are vLLM's dummies."""

import json
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
# By name, after their parameters: Llama-3.1-8B, Llama-3.2-1B, and one for a try.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}
# Where all weights, the norms' too, are vLLM's dummies: uniform up to 1e-3. Their root mean square,
# which rows of the embedding have too, and what a norm makes of those.
_DUMMY = 1e-3 / 3**0.5
_NORMED = _DUMMY * _DUMMY / (_DUMMY**2 + _LLAMA["rms_norm_eps"]) ** 0.5


def write(shape: str, folder: Path) -> Path:
    """The directory of a model of one of SHAPES: a config alone."""
    directory = folder / f"model-{shape}"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_LLAMA | SHAPES[shape]))
    return directory


def dummy_input_sizes(linears: dict[str, tuple[int, int]]) -> dict[str, float]:
    """About the root mean square of what each linear reads, by site, with dummy weights. linears:
    (in, out) features.

    A linear of n inputs multiplies that of its input by sqrt(n) of a weight's; an FFN multiplies
    two branches with each other and with silu's half; attention is left out. What the routers then
    choose is counted and printed beside the speeds.
    """
    sizes = {}
    for site, (features, _) in linears.items():
        leaf = site.rpartition(".")[2]
        hidden = features if leaf != "down_proj" else linears[_beside(site, "gate_proj")][0]
        branch = _NORMED * _DUMMY * hidden**0.5
        sizes[site] = {"o_proj": branch, "down_proj": branch**2 / 2}.get(leaf, _NORMED)
    return sizes


def _beside(site: str, leaf: str) -> str:
    return f"{site.rpartition('.')[0]}.{leaf}"
