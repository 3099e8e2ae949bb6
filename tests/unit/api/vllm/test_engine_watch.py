"""An engine that dies: who asks it is told, whether it had begun to answer or not."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from molehill.api.vllm.engine_watch import EngineWatch, StragglerError


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
        assert await EngineWatch(engine).collective_rpc("ask", args=(1,)) == ["ask", (1,), "yes"]
        engine.answer = asyncio.get_running_loop().create_future()
        engine.answer.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await EngineWatch(engine).collective_rpc("ask")

    asyncio.run(scenario())


def test_who_waits_for_an_engine_that_dies_is_told() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(EngineWatch(engine).collective_rpc("ask"))
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
            await asyncio.wait_for(EngineWatch(engine).collective_rpc("ask"), 0.1)
        assert not engine.answer.cancelled()

    asyncio.run(scenario())


class Engines:
    """Two engines, each of which answers when it is told to."""

    def __init__(self) -> None:
        self.errored = False
        self.dead_error = Dead()
        self.vllm = SimpleNamespace(core_engines=[b"0", b"1"], _call_utility_async=self._call)
        self.engine_core = self.vllm
        loop = asyncio.get_running_loop()
        self.answers: dict[bytes, asyncio.Future[list[Any]]] = {
            engine: loop.create_future() for engine in self.vllm.core_engines
        }

    async def _call(self, method: str, *args: Any, engine: bytes) -> list[Any]:
        assert (method, args) == ("collective_rpc", ("ask", None, (1,), None))
        return await self.answers[engine]


def test_the_workers_of_all_engines_answer_in_the_order_of_their_ranks() -> None:
    async def scenario() -> None:
        engines = Engines()
        engines.answers[b"1"].set_result(["c"])
        asking = asyncio.create_task(EngineWatch(engines, 2).collective_rpc("ask", args=(1,)))
        await asyncio.sleep(0.01)
        assert not asking.done()
        engines.answers[b"0"].set_result(["a", "b"])
        assert await asking == ["a", "b", "c"]

    asyncio.run(scenario())


def test_a_refusal_of_one_engine_is_raised_once_the_other_has_answered() -> None:
    async def scenario() -> None:
        engines = Engines()
        engines.answers[b"1"].set_exception(ValueError("no"))
        asking = asyncio.create_task(EngineWatch(engines, 2).collective_rpc("ask", args=(1,)))
        await asyncio.sleep(0.01)
        assert not asking.done()
        engines.answers[b"0"].set_result(["a"])
        with pytest.raises(ValueError, match="no"):
            await asking

    asyncio.run(scenario())


def test_an_engine_that_falls_behind_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        engines = Engines()
        engines.answers[b"0"].set_result(["a"])
        asking = EngineWatch(engines, 2, straggler_seconds=0.01).collective_rpc("ask", args=(1,))
        with pytest.raises(StragglerError, match=r"ask: found no answer of engines \[1\] in 0.01"):
            await asking
        # The question goes on, and its failure is logged.
        assert not engines.answers[b"1"].cancelled()
        engines.answers[b"1"].set_exception(ValueError("late"))
        await asyncio.sleep(0.01)
        assert "late" in caplog.text

    asyncio.run(scenario())


def test_several_engines_of_which_one_dies_are_dead() -> None:
    async def scenario() -> None:
        engines = Engines()
        engines.answers[b"0"].set_result(["a"])
        asking = asyncio.create_task(EngineWatch(engines, 2).collective_rpc("ask", args=(1,)))
        await asyncio.sleep(0.01)
        engines.errored = True
        with pytest.raises(Dead):
            await asyncio.wait_for(asking, 60)

    asyncio.run(scenario())
