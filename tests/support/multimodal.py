"""A tiny random Gemma 3 that reads images, and what Transformers and PEFT answer about one.

Its processor needs no torchvision; those of Qwen2.5-VL and Qwen3-VL (support.qwen_vl) have a part
for videos that does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from support.golden import TINY_LLAMA, Prompt
from support.tiny_models import MODELS, SIZES, fill

SIDE, PATCH = 56, 14
# Of an image, after pooling.
TOKENS = 4
VOCABULARY = 520
TOKEN_NAMES = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
TEXTS = ("<boi> The lamp and the map", "The lamp<boi> one hundred and five", "The lamp and the map")


def processor() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA, extra_special_tokens=TOKEN_NAMES)
    # vLLM looks for these around an image's tokens.
    tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=TOKENS)


def build(directory: Path) -> Path:
    """Saves the model and its processor; their directory."""
    both = processor()
    vocabulary = both.tokenizer.get_vocab()
    text = {**SIZES, **MODELS["gemma3_text"], "vocab_size": VOCABULARY, "sliding_window": 64}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS,
        boi_token_index=vocabulary[TOKEN_NAMES["boi_token"]],
        eoi_token_index=vocabulary[TOKEN_NAMES["eoi_token"]],
        image_token_index=vocabulary[TOKEN_NAMES["image_token"]],
    )
    config._attn_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    fill(model, seed=3)
    target = directory / "gemma3"
    model.save_pretrained(target)
    _rename(target / "model.safetensors")
    both.save_pretrained(target)
    return target


def _rename(file: Path) -> None:
    """To names of published checkpoints, which both know; vLLM knows no others of the tower."""
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(published, file, {"format": "pt"})


def load(path: Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def image(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """size: width and height."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs() -> list[dict[str, Any]]:
    """As vLLM takes them: of TEXTS, those that name an image have one of their own."""
    return [
        {"prompt": text, "multi_modal_data": {"image": image(i)}}
        if TOKEN_NAMES["boi_token"] in text
        else {"prompt": text}
        for i, text in enumerate(TEXTS)
    ]


def answer(model: nn.Module, name: str, given: dict[str, Any], steps: int, margin: float) -> Prompt:
    """Greedy tokens by full forwards. Each token sees those before it, tokens of images too, as
    vLLM has it on CPU; where a backend can, it lets those of an image see each other."""
    images = [given["multi_modal_data"]["image"]] if "multi_modal_data" in given else None
    both = processor()(images=images, text=given["prompt"], return_tensors="pt")
    pixels = {"pixel_values": both["pixel_values"]} if images else {}

    def ask(ids: Tensor) -> Tensor:
        after: Tensor = model(input_ids=ids, **pixels, use_cache=False).logits[0, -1]
        return after

    return greedy(ask, name, both["input_ids"], steps, margin)


@torch.no_grad()
def greedy(
    ask: Callable[[Tensor], Tensor], name: str, ids: Tensor, steps: int, margin: float
) -> Prompt:
    """ask: the logits after all ids `[1, tokens]`. ids: the prompt's, with those of its image."""
    prompt: Sequence[int] = ids[0].tolist()
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(ask(ids))
        tokens.append(int(logits[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
    first, second = torch.stack(logits).topk(2).values.unbind(1)
    assert (first - second).min() > margin, f"{name}: choose another seed"
    return Prompt(name, tuple(prompt), tuple(tokens), logits[0])
