"""Chats of many clients while a server is lost, and what became of each."""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai

MESSAGES: Any = [{"role": "user", "content": "The lamp and the map"}]
CLIENTS, BEFORE, AFTER = 6, 30, 60


@dataclass(frozen=True)
class Outcome:
    """Of one request. begun: whether a part of its answer came. after: asked after the loss.
    text: of the whole answer; None if it did not come. error: of which kind, and what it said."""

    model: str
    streamed: bool
    after: bool
    begun: bool
    text: str | None
    error: str = ""


def chat(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def ask(client: openai.OpenAI, model: str, streamed: bool, after: bool = False) -> Outcome:
    begun = False
    try:
        if not streamed:
            return Outcome(model, streamed, after, True, chat(client, model))
        parts, ended = [], False
        with client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0, stream=True
        ) as stream:
            for chunk in stream:
                begun = True
                parts += [choice.delta.content or "" for choice in chunk.choices]
                ended = any(choice.finish_reason for choice in chunk.choices) or ended
        return Outcome(model, streamed, after, True, "".join(parts) if ended else None, "no end")
    except (openai.APIError, httpx.TransportError) as error:
        return Outcome(model, streamed, after, begun, None, f"{type(error).__name__}: {error}")


def while_lost(
    client: openai.OpenAI, models: Sequence[str], lose: Callable[[], None]
) -> list[Outcome]:
    """Of BEFORE + AFTER requests of CLIENTS clients, of which the first after BEFORE loses it."""
    numbers, lost, lock = itertools.count(), threading.Event(), threading.Lock()

    def work() -> list[Outcome]:
        outcomes = []
        while (number := next(numbers)) < BEFORE + AFTER:
            with lock:
                if number >= BEFORE and not lost.is_set():
                    lose()
                    lost.set()
            model = models[number // 2 % len(models)]
            outcomes.append(ask(client, model, number % 2 == 0, lost.is_set()))
        return outcomes

    with ThreadPoolExecutor(CLIENTS) as pool:
        workers = [pool.submit(work) for _ in range(CLIENTS)]
        return [outcome for worker in workers for outcome in worker.result()]


def assert_only_begun_streams_were_lost(
    outcomes: Sequence[Outcome], expected: dict[str, str]
) -> None:
    """expected: the answer by model."""
    assert len(outcomes) == BEFORE + AFTER
    assert sum(outcome.after for outcome in outcomes) > AFTER / 2
    for outcome in outcomes:
        cut = outcome.text is None and outcome.begun and not outcome.after
        assert cut or outcome.text == expected[outcome.model], outcome
