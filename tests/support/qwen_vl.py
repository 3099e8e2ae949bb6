"""Tiny random Qwen2.5-VL and Qwen3-VL, and what Transformers and PEFT answer about an image.

The oracle's images are read with NumPy, the engine's with torchvision. None has to be resized.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support import multimodal
from support.golden import TINY_LLAMA, Prompt
from support.tiny_models import SIZES, fill

MERGE = 2
VOCABULARY = 520
TOKEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# With the width and the height of its image, in merged patches.
TEXTS = (
    (f"{IMAGE} The lamp and the map", (3, 2)),
    (f"The lamp{IMAGE} one hundred and five", (2, 4)),
    ("The lamp and the map", None),
)
TEXT = {**SIZES, "vocab_size": VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 1}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": SIZES["hidden_size"],
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        },
        # One window is two by two merged patches.
        "vision_config": {
            **VISION,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        # What the first layer sees goes to the language model's first layer too (deepstack).
        "vision_config": {
            **VISION,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
}
VIDEOS = {"qwen2_5_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}
PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def patch_size(name: str) -> int:
    return int(CONFIGS[name]["vision_config"]["patch_size"])


def _reading(name: str) -> dict[str, Any]:
    """Of images, as processors take it. vLLM reads how pixels are normalised from the file."""
    side = MERGE * patch_size(name)
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.6],
        "image_std": [0.3, 0.2, 0.25],
        "patch_size": patch_size(name),
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": side**2, "longest_edge": 16 * side**2},
    }


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_LLAMA, extra_special_tokens=TOKEN_NAMES)


def build(name: str, directory: Path) -> Path:
    """Saves a model of CONFIGS and its processor; their directory."""
    tokenizer = _tokenizer()
    ids = {f"{key}_id": tokenizer.convert_tokens_to_ids(t) for key, t in TOKEN_NAMES.items()}
    config = AutoConfig.for_model(name, **CONFIGS[name], **ids)
    config._attn_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    fill(model, seed=4)
    target = directory / name
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    processor = {"processor_class": PROCESSORS[name], **_reading(name)}
    images = {"image_processor_type": "Qwen2VLImageProcessor", **processor}
    videos = {"video_processor_type": VIDEOS[name], **processor}
    (target / "preprocessor_config.json").write_text(json.dumps(images))
    (target / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return target


def image(name: str, merged: tuple[int, int], seed: int) -> Image.Image:
    side = MERGE * patch_size(name)
    return multimodal.image(seed, (merged[0] * side, merged[1] * side))


def inputs(name: str) -> list[dict[str, Any]]:
    """As vLLM takes them."""
    return [
        {"prompt": text}
        if merged is None
        else {"prompt": text, "multi_modal_data": {"image": image(name, merged, i)}}
        for i, (text, merged) in enumerate(TEXTS)
    ]


def answer(
    model: Any, base: str, name: str, given: dict[str, Any], steps: int, margin: float
) -> Prompt:
    """Greedy tokens by full forwards. base: of CONFIGS."""
    read, text = {}, given["prompt"]
    if "multi_modal_data" in given:
        images = [given["multi_modal_data"]["image"]]
        read = dict(Qwen2VLImageProcessorPil(**_reading(base))(images, return_tensors="pt"))
        count = int(read["image_grid_thw"].prod()) // MERGE**2
        text = text.replace(TOKEN_NAMES["image_token"], TOKEN_NAMES["image_token"] * count)

    def ask(ids: Tensor) -> Tensor:
        kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).int()} if read else {}
        after: Tensor = model(input_ids=ids, **read, **kinds, use_cache=False).logits[0, -1]
        return after

    ids = _tokenizer()(text, return_tensors="pt")["input_ids"]
    return multimodal.greedy(ask, name, ids, steps, margin)
