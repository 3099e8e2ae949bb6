"""An engine that dies: who asks it is told, whether it had begun to answer or not."""

import asyncio
from typing import Any

import pytest

from molehill.api.vllm.lifeline import Lifeline


class Dead(Exception):
    """As vLLM's EngineDeadError."""


class Engine:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.errored = False
        self.dead_error = Dead()
        self.answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        return [method, args, *(await self.answer)]


def test_answers_and_errors_are_passed_on() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.answer.set_result(["yes"])
        assert await Lifeline(engine).collective_rpc("ask", args=(1,)) == ["ask", (1,), "yes"]
        engine.answer = asyncio.get_running_loop().create_future()
        engine.answer.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await Lifeline(engine).collective_rpc("ask")

    asyncio.run(scenario())


def test_who_waits_for_an_engine_that_dies_is_told() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(Lifeline(engine).collective_rpc("ask"))
        await asyncio.sleep(0.1)
        engine.errored = True
        with pytest.raises(Dead):
            await asyncio.wait_for(asking, 60)

    asyncio.run(scenario())


def test_a_question_outlives_whoever_asked_it() -> None:
    """vLLM would take its late answer for the next one's."""

    async def scenario() -> None:
        engine = Engine()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Lifeline(engine).collective_rpc("ask"), 0.1)
        assert not engine.answer.cancelled()

    asyncio.run(scenario())
