"""What a slow reader gets of an engine that does not wait for it. With vLLM's own outputs."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from molehill.api.vllm.read_ahead import ReadAhead


def output(text: str, token: int, finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(0, text, [token], None, None)
    return RequestOutput("id", None, [1], None, [completion], finished)


async def outputs(error: Exception | None = None) -> AsyncGenerator[RequestOutput, None]:
    for token, text in enumerate("abc"):
        yield output(text, token, finished=text == "c")
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("deltas", "text", "tokens"), [(True, "abc", [0, 1, 2]), (False, "c", [2])]
)
def test_what_is_unread_is_merged(deltas: bool, text: str, tokens: list[int]) -> None:
    async def scenario() -> None:
        ended: list[None] = []
        ahead = ReadAhead(outputs(), deltas, lambda: ended.append(None))
        await asyncio.sleep(0.01)
        assert len(ended) == 1
        result = await ahead.next()
        assert (result.finished, result.outputs[0].text) == (True, text)
        assert result.outputs[0].token_ids == tokens
        with pytest.raises(StopAsyncIteration):
            await ahead.next()

    asyncio.run(scenario())


def test_a_reader_may_wait_for_what_comes() -> None:
    async def scenario() -> None:
        ahead = ReadAhead(outputs(), True, lambda: None)
        reading = asyncio.create_task(ahead.next())
        assert (await asyncio.wait_for(reading, 60)).outputs[0].text

    asyncio.run(scenario())


def test_an_error_comes_after_what_came_before_it() -> None:
    async def scenario() -> None:
        ahead = ReadAhead(outputs(ValueError("dead")), True, lambda: None)
        await asyncio.sleep(0.01)
        assert (await ahead.next()).outputs[0].text == "abc"
        with pytest.raises(ValueError, match="dead"):
            await ahead.next()

    asyncio.run(scenario())


def test_stopping_closes_the_engines_outputs() -> None:
    async def scenario() -> None:
        events: list[str] = []

        async def endless() -> AsyncGenerator[RequestOutput, None]:
            try:
                yield output("a", 0)
                await asyncio.Event().wait()
            finally:
                events.append("closed")

        ahead = ReadAhead(endless(), True, lambda: events.append("ended"))
        await asyncio.sleep(0.01)
        await ahead.stop()
        await asyncio.sleep(0)
        assert events == ["closed", "ended"]

    asyncio.run(scenario())
