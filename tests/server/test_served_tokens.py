"""Adapters that add tokens to the base's vocabulary, over HTTP, against PEFT's answers and the
tokenizers that their trainers saved."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from support import vocabulary
from support.api_client import BASE, EXTRA_VOCAB, Api
from support.golden import TINY_LLAMA, VOCABULARY
from support.trained_tokens import ADDED, STEPS, Trained, train
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def trained(api: Api) -> Iterator[list[Trained]]:
    """Two of the same ids and of other words."""
    adapters = [
        train(api.root, "thinks", "grown-saved", ("<think>", "<|end|>")),
        train(api.root, "shouts", "grown-both", ("<shout>", "<|stop|>")),
    ]
    for adapter in adapters:
        body = {"name": adapter.name, "source": adapter.name}
        loaded = api.http.post("/v1/adapters", json=body)
        assert loaded.status_code == 200, loaded.text
    yield adapters
    for adapter in adapters:
        assert api.unload(adapter.name).status_code == 200


def complete(api: Api, model: str, prompt: Any, **more: Any) -> Any:
    body = {"return_token_ids": True, "ignore_eos": True, "skip_special_tokens": False}
    extra = {**body, **more.pop("extra_body", {})}
    given = {"max_tokens": STEPS, "temperature": 0, **more}
    return api.openai.completions.create(model=model, prompt=prompt, extra_body=extra, **given)


def test_texts_are_read_and_answered_as_by_their_trainers(api: Api, trained: list[Trained]) -> None:
    """Those of two adapters and of the base, at once."""
    prompts = {adapter.name: adapter.prompt for adapter in trained} | {BASE: trained[0].prompt}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda job: complete(api, *job), prompts.items()))
    for adapter, (choice,) in zip(trained, (a.choices for a in answers), strict=False):
        assert choice.prompt_token_ids == adapter.tokenizer(adapter.prompt)["input_ids"]
        assert tuple(choice.token_ids) == adapter.greedy
        assert choice.text == adapter.tokenizer.decode(adapter.greedy)
    (of_base,) = answers[-1].choices
    base_tokenizer: Any = AutoTokenizer.from_pretrained(TINY_LLAMA)
    assert of_base.prompt_token_ids == base_tokenizer(trained[0].prompt)["input_ids"]
    assert max(of_base.token_ids) < VOCABULARY
    shown = api.http.get(f"/v1/adapters/{trained[1].name}").json()
    assert shown["vocabulary"] == {
        "rows": {"embed_tokens": 2, "lm_head": 2},
        "added_tokens": ADDED,
        "texts": {str(ADDED[0]): "<shout>", str(ADDED[1]): "<|stop|>"},
    }
    assert shown["warnings"] == []
    assert shown["chat"]["stop_token_ids"] == [ADDED[1]]


def test_an_added_token_is_streamed_and_ends_an_answer(api: Api, trained: list[Trained]) -> None:
    for adapter in trained:
        biased = {"logit_bias": {str(ADDED[0]): 100.0}}
        stream = complete(api, adapter.name, "the", stream=True, **biased)
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert text == adapter.tokenizer.decode([ADDED[0]] * STEPS)
        ended = complete(
            api,
            adapter.name,
            "the",
            logit_bias={str(ADDED[1]): 100.0},
            logprobs=1,
            extra_body={"ignore_eos": False},
        )
        assert ended.choices[0].finish_reason == "stop"
        assert ended.choices[0].logprobs.tokens == [adapter.words[1]]


def test_chats_and_tokenize_know_them(api: Api, trained: list[Trained]) -> None:
    for adapter in trained:
        ids = adapter.tokenizer(adapter.prompt)["input_ids"]
        asked = {"model": adapter.name, "prompt": adapter.prompt, "return_token_strs": True}
        answered = api.http.post("/tokenize", json=asked).json()
        assert answered["tokens"] == ids
        assert adapter.words[0] in answered["token_strs"]
        asked = {"model": adapter.name, "tokens": ids}
        prompt = api.http.post("/detokenize", json=asked).json()["prompt"]
        assert prompt == adapter.tokenizer.decode(ids)
        messages: Any = [{"role": "user", "content": adapter.words[0]}]
        extra = {"return_token_ids": True}
        chat: Any = api.openai.chat.completions.create(
            model=adapter.name, messages=messages, max_tokens=1, extra_body=extra
        )
        assert ADDED[0] in chat.prompt_token_ids


@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ([5, ADDED[0]], {}),
        ([5], {"logit_bias": {str(ADDED[0]): 1.0}}),
        ([5], {"extra_body": {"allowed_token_ids": [ADDED[1]]}}),
    ],
    ids=["prompt", "logit_bias", "allowed_token_ids"],
)
def test_nobody_else_has_these_ids(
    api: Api, trained: list[Trained], prompt: list[int], more: dict[str, Any]
) -> None:
    assert complete(api, trained[0].name, prompt, **more).choices
    for model in (BASE, "started"):
        with pytest.raises(openai.BadRequestError, match="is out of vocabulary"):
            complete(api, model, prompt, **more)
    beyond = [VOCABULARY + EXTRA_VOCAB - 1]
    with pytest.raises(openai.BadRequestError, match="is out of vocabulary"):
        complete(api, trained[0].name, beyond)


def test_beams_that_would_be_written_without_them_are_refused(
    api: Api, trained: list[Trained]
) -> None:
    beams: Any = {"use_beam_search": True}
    assert complete(api, "started", "the", n=2, extra_body=beams).choices
    with pytest.raises(openai.BadRequestError, match="beam search with an adapter that adds"):
        complete(api, trained[0].name, "the", n=2, extra_body=beams)


def test_more_tokens_than_there_is_room_for(api: Api) -> None:
    added = EXTRA_VOCAB + 1
    folder = api.root / "too-many"
    vocabulary.save(TINY_LLAMA, folder, vocabulary.GROWN["grown"], added=added)
    refused = api.http.post("/v1/adapters", json={"name": "many", "source": "too-many"})
    _, kind, message = api.error(refused)
    assert kind == "unsupported"
    assert f"{VOCABULARY + added} tokens, {added} of them added" in message
    assert f"a server with --extra-vocab {added} takes it" in message
