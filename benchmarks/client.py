"""A client of one server: loads and unloads adapters, asks, and knows some answers by heart."""

import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROMPT = 16
# A token whose log-probability leads by less may be another one in another batch, where rounding
# differs; so may all that follow it.
MARGIN = 0.5


@dataclass(frozen=True)
class KnownAnswer:
    """A prompt, and its greedy tokens up to the first that another batch may change."""

    prompt: list[int]
    tokens: list[int]

    def agrees(self, answer: list[int]) -> bool:
        return answer[: len(self.tokens)] == self.tokens


def decided(tokens: list[int], likely: list[dict[str, float]]) -> list[int]:
    """The tokens before the first near-tie. likely: log-probabilities of the best two at each."""
    result = []
    for token, position in zip(tokens, likely, strict=True):
        best, second = sorted(position.values(), reverse=True)[:2]
        if best - second < MARGIN:
            break
        result.append(token)
    return result


@dataclass
class Client:
    """Asks one server. steady: an adapter that is always there."""

    http: httpx.AsyncClient
    base: str
    steady: str = "steady"
    seeds: Iterator[int] = field(default_factory=itertools.count)

    def body(self, model: str, tokens: int, known: KnownAnswer | None = None) -> dict[str, Any]:
        """Prompts that are not `known` differ, so that batches are as those of many users."""
        prompt = self.prompt() if known is None else known.prompt
        greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        return {"model": model, "prompt": prompt, "return_token_ids": True, **greedy}

    def prompt(self) -> list[int]:
        number = next(self.seeds)
        return [3 + (number * 7919 + 31 * i) % 400 for i in range(PROMPT)]

    async def load(self, name: str, source: Path | str, **more: Any) -> None:
        body = {"name": name, "source": str(source), **more}
        (await self.http.post("/v1/adapters", json=body)).raise_for_status()

    async def upload(self, name: str, contents: Mapping[str, bytes]) -> None:
        """contents: of the adapter's files, by name."""
        files = [("file", (file, data)) for file, data in contents.items()]
        answer = await self.http.post("/v1/adapters", data={"name": name}, files=files)
        answer.raise_for_status()

    async def unload(self, name: str) -> None:
        (await self.http.delete(f"/v1/adapters/{name}")).raise_for_status()

    async def learn(self, model: str, tokens: int) -> KnownAnswer:
        """Asks for a new prompt and the lead of each of its tokens."""
        known = KnownAnswer(self.prompt(), [])
        body = {**self.body(model, tokens, known), "logprobs": 2}
        answer = await self.http.post(
            "/v1/completions", json={**body, "return_tokens_as_token_ids": True}
        )
        choice = answer.raise_for_status().json()["choices"][0]
        return KnownAnswer(
            known.prompt, decided(choice["token_ids"], choice["logprobs"]["top_logprobs"])
        )

    async def complete(self, model: str, tokens: int, known: KnownAnswer | None = None) -> str:
        """Why it failed, or nothing."""
        try:
            answer = await self.http.post("/v1/completions", json=self.body(model, tokens, known))
        except httpx.HTTPError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        token_ids = answer.json()["choices"][0]["token_ids"]
        if len(token_ids) != tokens:
            return f"{len(token_ids)} tokens of {tokens}"
        if known is not None and not known.agrees(token_ids):
            return f"{model} answers otherwise than before"
        return ""

    async def stream(self, model: str, tokens: int) -> AsyncGenerator[float, None]:
        """When each token arrived."""
        async with aclosing(self.chunks(model, tokens)) as chunks:
            async for now, _ in chunks:
                yield now

    async def chunks(self, model: str, tokens: int) -> AsyncGenerator[tuple[float, str], None]:
        """When each arrived, and its JSON; of a slow reader one may hold several tokens."""
        body = {**self.body(model, tokens), "stream": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield time.perf_counter(), line.removeprefix("data: ")
