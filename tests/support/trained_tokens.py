"""Adapters with tokens of their own, and their tokenizers, as trainers save them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from support import vocabulary
from support.golden import TINY_LLAMA, VOCABULARY
from support.oracle import answer

STEPS = 6
TEXT = "the{0}lamp{1} and the map"
ADDED = [VOCABULARY, VOCABULARY + 1]


@dataclass
class Trained:
    """words: of the added tokens. prompt: TEXT with them. greedy: what PEFT answers to it."""

    name: str
    words: tuple[str, str]
    tokenizer: Any
    prompt: str
    greedy: tuple[int, ...]


def train(root: Path, name: str, settings: str, words: tuple[str, str]) -> Trained:
    """What a trainer saves that adds a token, and one that ends answers."""
    folder = root / name
    model = vocabulary.author(TINY_LLAMA, folder, settings)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.add_tokens([words[0]])
    tokenizer.add_special_tokens({"eos_token": words[1]})
    tokenizer.save_pretrained(folder)
    prompt = TEXT.format(*words)
    ids = tokenizer(prompt)["input_ids"]
    assert sorted({*ids} & {*ADDED}) == ADDED
    return Trained(name, words, tokenizer, prompt, answer(model, name, ids, STEPS).greedy)
