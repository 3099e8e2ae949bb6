"""Activated adapters over HTTP: what PEFT answered, whose cache it was, and what is refused."""

from typing import Any

import openai
import pytest
from support.activated import INVOCATION, golden_prompts
from support.api_client import BASE, Api, copy_adapter, edit_config, oracle
from support.golden import TINY_LLAMA
from transformers import AutoTokenizer

ABSENT = next(p for p in oracle("alora")["prompts"] if p["invocation_start"] is None)


def load(api: Api, name: str, source: str, **more: Any) -> Any:
    answer = api.http.post("/v1/adapters", json={"name": name, "source": source, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_activated_lora_gives_pefts_tokens_beside_the_base(clean: Api) -> None:
    shown = load(clean, "own", "alora")
    assert (shown["alora_invocation_tokens"], shown["when_not_invoked"]) == (INVOCATION, "refuse")
    for prompt in golden_prompts():
        assert clean.greedy("own", list(prompt.ids)) == list(prompt.greedy)


def cached(api: Api, model: str, prompt: list[int]) -> int:
    result: int = api.complete(model, prompt, 1).usage.prompt_tokens_details.cached_tokens
    return result


def test_the_answers_usage_tells_what_the_base_has_read(clean: Api) -> None:
    load(clean, "own", "alora")
    load(clean, "plain", "lora")
    document = [(29 * i + 7) % 280 + 5 for i in range(70)]
    prompt = [*document, *INVOCATION]
    assert [cached(clean, model, prompt) for model in (BASE, "own", "plain")] == [0, 64, 0]
    other = [*document[::-1], *INVOCATION]
    assert [cached(clean, model, other) for model in ("own", BASE)] == [0, 64]


def test_a_prompt_without_the_invocation_is_refused_with_the_tokens_and_their_text(
    clean: Api,
) -> None:
    load(clean, "own", "alora")
    text = AutoTokenizer.from_pretrained(TINY_LLAMA).decode(INVOCATION)
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match=r"\[301, 17, 302\]") as refused:
            clean.complete("own", ABSENT["prompt_token_ids"], **more)
        assert repr(text) in refused.value.message
        assert 'when_not_invoked": "base"' in refused.value.message.replace("\\", "")
    with pytest.raises(openai.BadRequestError, match="that activate the adapter 'own'"):
        clean.openai.chat.completions.create(
            model="own", messages=[{"role": "user", "content": "hello"}], max_tokens=1
        )
    body = {"model": "own", "prompt": INVOCATION, "max_tokens": 2, "n": 2, "use_beam_search": True}
    answer = clean.http.post("/v1/completions", json=body)
    assert (answer.status_code, "beam search" in answer.text) == (400, True)
    metrics = clean.metrics()
    series = 'molehill_requests_not_invoked_total{{adapter="own",outcome="{}"}}'
    assert [metrics[series.format(outcome)] for outcome in ("refused", "base")] == [4, 0]


def test_the_base_answers_instead_where_it_is_asked_for(clean: Api) -> None:
    load(clean, "own", "alora", when_not_invoked="base")
    assert clean.greedy("own", ABSENT["prompt_token_ids"]) == ABSENT["base_greedy_token_ids"]
    series = 'molehill_requests_not_invoked_total{adapter="own",outcome="base"}'
    assert clean.metrics()[series] == 1
    prompt = golden_prompts()[0]
    assert clean.greedy("own", list(prompt.ids)) == list(prompt.greedy)


def test_what_is_said_of_an_adapter_that_is_not_activated_is_refused(clean: Api) -> None:
    body = {"name": "own", "source": "lora", "when_not_invoked": "base"}
    status, kind, message = clean.error(clean.http.post("/v1/adapters", json=body))
    assert (status, kind) == (400, "not_activated")
    assert "no alora_invocation_tokens" in message


def test_a_mixture_that_is_activated(clean: Api) -> None:
    folder = copy_adapter("dynmole-k1", clean.root / "activated-dynmole")
    edit_config(folder, alora_invocation_tokens=[9, 10])
    load(clean, "mixture", "activated-dynmole")
    load(clean, "plain", "dynmole-k1")
    # From the first token on it is the plain mixture.
    prompt = [9, 10, 303, 316, 288]
    assert clean.greedy("mixture", prompt) == clean.greedy("plain", prompt)
