"""What clients see of streams while they run, and of a stream that may not begin."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
from support.api_client import BASE, Api, Running, eventually, oracle

TOKENS = 700


def test_no_stream_is_held_back(api: Api) -> None:
    """Steps take some milliseconds, and every one of them has its chunk: no client waits for a
    large part of the whole. vLLM's own waiting held answers back for half of it and more on two
    cores that did nothing else."""
    prompt = oracle("base")["prompts"][0]["prompt_token_ids"]

    def longest_gap(start: float) -> float:
        last, longest = start, 0.0
        for _ in api.complete(BASE, prompt, TOKENS, stream=True):
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        return longest

    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        gaps = list(pool.map(longest_gap, [start] * 2))
    assert max(gaps) < (time.monotonic() - start) / 5


def test_an_adapter_gets_no_more_than_its_limits(clean: Api) -> None:
    """Three streams at a time where two may be, then more tokens than there are, then all."""

    def load(limits: Any) -> httpx.Response:
        body = {"name": "limited", "source": "lora", "limits": limits}
        return clean.http.post("/v1/adapters", json=body)

    def info() -> Any:
        return clean.http.get("/v1/adapters/limited").json()

    def stream(_: int) -> Running | openai.RateLimitError:
        try:
            return Running(clean, "limited", [5, 6, 7], 1500)
        except openai.RateLimitError as error:
            return error

    limits: dict[str, Any] = {"requests_in_flight": 2, "tokens_per_second": None}
    limits |= {"tenant": "streams", "tenant_slots": 3}
    assert load(limits).json()["status"] == "loaded"
    assert info()["limits"] == limits
    with ThreadPoolExecutor(3) as pool:
        started = list(pool.map(stream, range(3)))
    (refused,) = (one for one in started if isinstance(one, openai.RateLimitError))
    assert refused.response.headers["Retry-After"] == "1"
    status, kind, message = clean.error(refused.response)
    assert (status, kind) == (429, "adapter_limit_reached")
    assert "limits.requests_in_flight: found 2 in flight" in message
    for one in started:
        if isinstance(one, Running):
            one.disconnect()
    assert eventually(lambda: info()["requests_in_flight"] == 0)

    assert load({"tokens_per_second": 1}).json()["status"] == "limits_changed"
    prompt = oracle("lora")["prompts"][0]
    assert clean.greedy("limited", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    # As Anthropic's clients ask; vLLM's route answers errors itself there.
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "limited", "max_tokens": 1, "messages": messages}
    answer = clean.http.post("/v1/messages", json=body)
    assert clean.error(answer)[:2] == (429, "adapter_limit_reached")
    assert int(answer.headers["Retry-After"]) > 1
    wrong = load({"tokens_per_second": 1e10})
    assert clean.error(wrong)[:2] == (422, "invalid_limits")
    assert "limits.tokens_per_second: found 10000000000.0" in clean.error(wrong)[2]
    assert load(None).json()["status"] == "limits_changed"
    assert clean.greedy("limited", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    metrics = clean.metrics()
    for reason in ("requests_in_flight", "tokens_per_second"):
        labels = f'{{adapter="limited",reason="{reason}"}}'
        assert metrics[f"molehill_adapter_limit_refusals_total{labels}"] == 1
