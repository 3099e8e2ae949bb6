"""Tokens of calls of an engine client, and answers of requests that a limit refuses."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from support.world import World
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from molehill.api.adapters.traffic_limits import TrafficLimits
from molehill.api.http.limit_refusals import LimitRefusals
from molehill.api.vllm.generation_header import GenerationHeader
from molehill.api.vllm.leased_calls import wrap_engine_client
from molehill.api.vllm.token_charges import charged, is_later_beam, prompt_tokens

PROMPT = {"type": "token", "prompt_token_ids": list(range(30))}


def output(finished: bool, *samples: tuple[int, int]) -> RequestOutput:
    """samples: indices with how many tokens each."""
    outputs = [CompletionOutput(i, "", [7] * count, None, None) for i, count in samples]
    return RequestOutput("id", None, [1], None, outputs, finished)


async def replay(outputs: Sequence[Any]) -> AsyncGenerator[Any, None]:
    for one in outputs:
        yield one


@pytest.mark.parametrize(
    ("deltas", "outputs", "charges"),
    [
        (True, [output(False, (0, 2)), output(False, (1, 1)), output(True, (0, 3))], [2, 1, 3]),
        (False, [output(False, (0, 2)), output(False, (1, 4)), output(True, (0, 5))], [2, 4, 3]),
        (False, [output(True, (0, 5), (1, 6))], [5, 6]),
        (True, [PoolingRequestOutput("id", torch.ones(3), [1], 0, True)], []),
    ],
)
def test_every_generated_token_is_charged_once(
    deltas: bool, outputs: list[Any], charges: list[int]
) -> None:
    async def run() -> None:
        seen: list[int] = []
        stream = charged(replay(outputs), seen.append, deltas)
        assert [one async for one in stream] == outputs
        assert seen == charges

    asyncio.run(run())


def test_tokens_of_prompts() -> None:
    assert prompt_tokens(PROMPT) == 30
    assert prompt_tokens({"decoder_prompt": PROMPT, "encoder_prompt": {}}) == 30
    assert prompt_tokens({"type": "embeds", "prompt_embeds": torch.zeros(5, 2)}) == 5
    assert prompt_tokens(replay([])) == 0


def test_of_a_beam_search_one_prompt_counts() -> None:
    beam = SamplingParams(max_tokens=1, detokenize=False)
    step = {"request_id": "cmpl-0-0123456789abcdef-beam-1", "sampling_params": beam}
    assert [is_later_beam(step, first=first) for first in (True, False)] == [False, True]
    assert not is_later_beam({**step, "request_id": "cmpl-0"}, first=False)


def test_prompts_under_an_id_like_that_of_a_beam_are_charged() -> None:
    """A client's X-Request-Id begins the ids of all prompts of its request."""
    for n in range(2):
        call = {"request_id": f"cmpl-0-0123456789abcdef-beam-{n}"}
        assert not is_later_beam({**call, "sampling_params": SamplingParams()}, first=False)


class Engine:
    """Gives one token, and once it may go on 50. prompts: that it was asked for."""

    def __init__(self) -> None:
        self.prompts = 0
        self.more = asyncio.Event()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[RequestOutput, None]:
        self.prompts += 1
        yield output(False, (0, 1))
        await self.more.wait()
        yield output(True, (0, 50))

    encode = generate


def application(w: World, engine: Engine) -> FastAPI:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)
    app.add_middleware(LimitRefusals)
    app.add_middleware(GenerationHeader)

    async def read(name: str) -> None:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        outputs = engine.generate(PROMPT, params, "id", lora_request=w.served[name])
        async with aclosing(outputs):
            assert len([one async for one in outputs]) == 2

    @app.post("/ask/{name}")
    async def ask(name: str) -> Response:
        await read(name)
        return PlainTextResponse("answered")

    @app.post("/catch/{name}")
    async def catch(name: str) -> Response:
        """As vLLM's route of Anthropic's messages."""
        try:
            await read(name)
        except GracefulHTTPError as error:
            return Response(status_code=create_error_response(error).error.code)
        return PlainTextResponse("answered")

    return app


@pytest.mark.parametrize("path", ["ask", "catch"])
def test_a_request_over_a_limit_is_told_when_to_come_back(tmp_path: Path, path: str) -> None:
    """Before the engine is asked; prompt and answer together are what it pays for."""
    seconds = [0.0]

    async def run() -> None:
        w, engine = World(tmp_path, clock=lambda: seconds[0]), Engine()
        wrap_engine_client(engine, w.registry)
        await w.load("a", 1, limits=TrafficLimits(2, 35.0))
        transport = httpx.ASGITransport(application(w, engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            running = [asyncio.create_task(http.post(f"/{path}/a")) for _ in range(2)]
            while engine.prompts < 2 and not any(task.done() for task in running):
                await asyncio.sleep(0.001)
            refused = await http.post(f"/{path}/a")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"] == {
                "message": "'a': limits.requests_in_flight: found 2 in flight, expected at most 2",
                "type": "adapter_limit_reached",
                "param": "model",
                "code": 429,
            }
            engine.more.set()
            assert [(await task).text for task in running] == ["answered", "answered"]
            # Two prompts of 30 tokens and two answers of 51: 127 more than there were.
            refused = await http.post(f"/{path}/a")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "4")
            assert "limits.tokens_per_second" in refused.json()["error"]["message"]
            assert engine.prompts == 2
            seconds[0] = 4.0
            assert (await http.post(f"/{path}/a")).text == "answered"

    asyncio.run(asyncio.wait_for(run(), 20))
