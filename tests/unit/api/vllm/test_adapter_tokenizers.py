"""Tokenizers of adapters that add tokens, against what Transformers saved and reads."""

import asyncio
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.golden import TINY_LLAMA
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

from molehill.api.adapters.chat import AdapterChat, BaseChat, ChatReader, served_texts, without_rows
from molehill.api.vllm.adapter_tokenizers import (
    AdapterTokenizers,
    check_written,
    with_adapter_texts,
    with_adapter_tokenizers,
)
from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.formats.io.tokenizer_files import TokenText

TEXT = "a<think>b</s> <|end|> c"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """What a trainer saves that adds two tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    folder: Path = tmp_path_factory.mktemp("trained")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers() -> AdapterTokenizers:
    """Of a tokenizer as vLLM's renderer has it."""
    base = AutoTokenizer.from_pretrained(TINY_LLAMA)
    return AdapterTokenizers(maybe_make_thread_pool(get_cached_tokenizer(base)))


def base_chat(tokenizers: AdapterTokenizers) -> BaseChat:
    base = AutoTokenizer.from_pretrained(TINY_LLAMA)
    special = dict(base.special_tokens_map)
    return BaseChat({}, special, base.get_vocab(), base.eos_token_id, tokenizers.takes)


@pytest.fixture(scope="module")
def chat(trained: Path, tokenizers: AdapterTokenizers) -> AdapterChat:
    read = ChatReader(base_chat(tokenizers))(trained)
    assert read is not None
    return read


def test_texts_are_read_and_written_as_by_the_trainers_tokenizer(
    trained: Path, tokenizers: AdapterTokenizers, chat: AdapterChat
) -> None:
    expected = AutoTokenizer.from_pretrained(trained)
    assert [(text.text, text.id) for text in chat.token_texts] == [
        ("<think>", 512),
        ("<|end|>", 513),
    ]
    assert chat.warnings == ()
    # Answers end there.
    assert chat.stop_token_ids == (513,)
    tokenizer = tokenizers.of(chat.token_texts)
    ids = expected(TEXT)["input_ids"]
    assert {512, 513} < set(ids)
    assert tokenizer(TEXT)["input_ids"] == ids
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected.decode(
            ids, skip_special_tokens=skip
        )
    assert tokenizer.max_token_id == 513
    assert tokenizers.of(chat.token_texts) is tokenizer


def test_what_is_served_goes_by_the_rows(chat: AdapterChat) -> None:
    both = chat.token_texts
    assert served_texts(chat, AddedTokens(512, (512, 513)), 512) == both
    # A base whose embedding has more rows than its tokenizer has tokens.
    assert served_texts(chat, AddedTokens(), 600) == both
    assert served_texts(chat, AddedTokens(512, (512,)), 512) == both[:1]
    (warning,) = without_rows(chat, both[:1])
    assert "found added tokens that the base's lacks: '<|end|>'; without rows" in warning
    assert without_rows(chat, both) == ()


def test_tokens_at_other_ids_are_no_part_of_it(tokenizers: AdapterTokenizers) -> None:
    assert not tokenizers.takes((TokenText("<think>", 513),))
    assert not tokenizers.takes((TokenText("</s>", 512),))


def test_few_tokenizers_are_kept(tokenizers: AdapterTokenizers) -> None:
    few = AdapterTokenizers(tokenizers.of((TokenText("<a>", 512),)), most=1)
    first = few.of((TokenText("<b>", 513),))
    few.of((TokenText("<c>", 513),))
    assert few.of((TokenText("<b>", 513),)) is not first


class Owner:
    """As vLLM's have them: a renderer, and methods with a request."""

    def __init__(self) -> None:
        self.renderer = SimpleNamespace(
            tokenizer="base's",
            _executor=None,
            _tokenize_prompt=lambda: None,
            _decode=lambda: None,
            _tokenize_prompt_async=None,
        )
        self.tokenizer = "base's"
        self.seen: list[Any] = []

    async def render(self, request: Any, more: int = 0) -> tuple[Any, int]:
        return self.renderer.tokenizer, more

    def add_request(self, request: Any, prompt: str) -> None:
        self.seen.append((self.tokenizer, prompt))


def test_a_request_has_the_tokenizer_of_its_adapter(
    tokenizers: AdapterTokenizers, chat: AdapterChat
) -> None:
    owner, texts = Owner(), chat.token_texts
    of_adapter = tokenizers.of(texts)
    render = with_adapter_tokenizers(
        owner, "render", tokenizers, lambda name: texts if name == "a" else ()
    )
    for model, expected in (("a", of_adapter), ("b", "base's"), (None, "base's")):
        request = SimpleNamespace(model=model)
        assert asyncio.run(render(request, more=3)) == (expected, 3)
    # Whoever wraps it in turn finds its parameters.
    assert list(inspect.signature(render).parameters) == ["request", "more"]
    add = with_adapter_texts(owner, tokenizers, lambda request: texts if request == "a" else ())
    for lora_request in ("a", "b", None):
        add(SimpleNamespace(lora_request=lora_request), "prompt")
    assert owner.seen == [(of_adapter, "prompt"), ("base's", "prompt"), ("base's", "prompt")]
    assert owner.tokenizer == owner.renderer.tokenizer == "base's"


def test_beams_are_not_written_by_it(chat: AdapterChat) -> None:
    beam = SamplingParams(max_tokens=1, detokenize=False)
    step = {"request_id": "cmpl-0-0123456789abcdef-beam-1", "sampling_params": beam}
    check_written((), step)
    check_written(chat.token_texts, {**step, "sampling_params": SamplingParams()})
    with pytest.raises(VLLMValidationError, match=r"beam search with .* adds tokens .'<think>'"):
        check_written(chat.token_texts, step)
