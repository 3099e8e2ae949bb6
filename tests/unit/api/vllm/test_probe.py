"""An adapter is probed, or it does not serve: a probe that could not run is no probe."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.world import World, let_tasks_run
from vllm.exceptions import GracefulHTTPError

from molehill.api.adapters.errors import EngineRefusedError, NoEffectError, NotProbedError
from molehill.api.http.errors import status_of
from molehill.api.vllm.probe import PROMPT_TOKENS, Prober

Answer = list[Mapping[int, Any] | None] | None


@dataclass
class Engine:
    """What a probe asks: log-probabilities of the prompt, of the base and of the adapter."""

    base: Answer
    adapted: Answer
    fails: str = ""
    prompts: list[list[int]] = field(default_factory=list)

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[Any, None]:
        self.prompts.append(prompt["prompt_token_ids"])
        who = "base" if lora_request is None else "adapted"
        if self.fails == who:
            raise ValueError("a fault of the engine")
        yield SimpleNamespace(prompt_logprobs=getattr(self, who))


def logprobs(value: float) -> Answer:
    return [None, {5: SimpleNamespace(logprob=value)}]


def probe(engine: Engine) -> None:
    generation: Any = SimpleNamespace(
        name="a",
        request=object(),
        content=SimpleNamespace(invocation_tokens=(3,), probe_tokens=(70, 71)),
    )
    asyncio.run(Prober(engine.generate, PROMPT_TOKENS)(generation))
    assert all(prompt[:3] == [3, 70, 71] for prompt in engine.prompts)


def test_a_difference_passes_and_none_is_refused() -> None:
    probe(Engine(logprobs(-1.0), logprobs(-1.5)))
    with pytest.raises(NoEffectError):
        probe(Engine(logprobs(-1.0), logprobs(-1.0)))


@pytest.mark.parametrize("fails", ["base", "adapted"])
def test_a_probe_that_gets_no_answer_is_not_passed(fails: str) -> None:
    with pytest.raises(NotProbedError, match="no answer") as refusal:
        probe(Engine(logprobs(-1.0), logprobs(-1.5), fails))
    assert status_of(refusal.value) == 503
    assert "allow_noop" in str(refusal.value)


@pytest.mark.parametrize("missing", [None, []])
def test_an_answer_without_log_probabilities_is_none(missing: Answer) -> None:
    """That two say nothing is no agreement, nor is it a difference."""
    with pytest.raises(NotProbedError):
        probe(Engine(missing, missing))
    with pytest.raises(NotProbedError):
        probe(Engine(logprobs(-1.0), missing))


def play(world: World, scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(world), 20))


class Probes:
    """Cannot run until it is told that it can."""

    def __init__(self) -> None:
        self.able = False
        self.ran: list[str] = []

    async def __call__(self, generation: Any) -> None:
        if not self.able:
            raise NotProbedError("found no answer")
        self.ran.append(generation.name)


def test_a_load_whose_probe_cannot_run_is_refused_and_can_be_tried_again(tmp_path: Path) -> None:
    probes = Probes()

    async def scenario(w: World) -> None:
        with pytest.raises(EngineRefusedError, match="no answer"):
            await w.load("a", 1)
        assert (w.served, w.engine.loaded, w.in_store()) == ({}, {}, [])
        probes.able = True
        assert (await w.load("a", 1)).status == "loaded"
        assert probes.ran == ["a"]

    play(World(tmp_path, probe=probes), scenario)


def test_a_late_probe_that_cannot_run_refuses_the_request_and_runs_before_the_next(
    tmp_path: Path,
) -> None:
    probes = Probes()

    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("filler", 9, allow_noop=True)
        generation = (await w.load("a", 1, eager=False)).generation
        for _ in range(2):
            with pytest.raises(GracefulHTTPError, match="no answer") as refusal:
                await anext(w.generate("a"))
            assert refusal.value.http_status == 503
        await let_tasks_run()
        # It is no fault of the adapter's: it stays, and is not taken for probed.
        assert set(w.served) == {"filler", "a"}
        assert generation.status.check is not None
        assert not generation.status.slot.resident
        probes.able = True
        assert [output async for output in w.generate("a")] == ["first", "last"]
        assert (probes.ran, generation.status.check) == (["a"], None)

    play(World(tmp_path, slots=1, probe=probes), scenario)


def test_who_loads_it_again_with_allow_noop_asks_for_no_probe(tmp_path: Path) -> None:
    probes = Probes()

    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("filler", 9, allow_noop=True)
        await w.load("a", 1, eager=False)
        assert (await w.load("a", 1, allow_noop=True)).status == "unchanged"
        assert [output async for output in w.generate("a")] == ["first", "last"]
        assert probes.ran == []

    play(World(tmp_path, slots=1, probe=probes), scenario)


class Pausable:
    """A probe that an engine answers when it is not paused, and until then keeps waiting."""

    def __init__(self, error: Exception | None = None) -> None:
        self.goes_on = asyncio.Event()
        self.error = error
        self.ran: list[str] = []

    async def paused(self) -> bool:
        return not self.goes_on.is_set()

    async def __call__(self, generation: Any) -> None:
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        self.ran.append(generation.name)


def test_a_load_into_a_paused_engine_is_probed_before_its_first_request(tmp_path: Path) -> None:
    """A trainer resumes the engine once its load is answered."""
    probe = Pausable()

    async def scenario(w: World) -> None:
        w.engine.more.set()
        generation = (await w.load("a", 1)).generation
        assert (probe.ran, set(w.served), generation.status.slot.resident) == ([], {"a"}, True)
        first = asyncio.create_task(anext(w.generate("a")))
        await let_tasks_run()
        # It keeps its slot while it is checked, although no request runs on it yet.
        other = asyncio.create_task(w.load("b", 2, allow_noop=True))
        await let_tasks_run()
        assert not first.done()
        assert not other.done()
        assert list(w.engine.loaded.values()) == ["a"]
        probe.goes_on.set()
        assert await first == "first"
        assert (probe.ran, generation.status.check) == (["a"], None)
        assert generation.status.slot.loads == 1
        await other
        assert [output async for output in w.generate("a")] == ["first", "last"]
        await w.load("c", 3)
        assert probe.ran == ["a", "c"]

    play(World(tmp_path, slots=1, probe=probe, paused=probe.paused), scenario)


def test_what_changes_nothing_is_withdrawn_once_the_engine_goes_on(tmp_path: Path) -> None:
    probe = Pausable(NoEffectError("found no difference"))

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        probe.goes_on.set()
        with pytest.raises(GracefulHTTPError, match="no difference"):
            await anext(w.generate("a"))
        await let_tasks_run()
        assert (w.served, w.engine.loaded, w.in_store()) == ({}, {}, [])
        assert w.registry.failures["a"].kind == "no_effect"

    play(World(tmp_path, probe=probe, paused=probe.paused), scenario)


def test_what_is_unloaded_while_it_is_checked_leaves_its_slot(tmp_path: Path) -> None:
    probe = Pausable()

    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", 1)
        request = asyncio.create_task(anext(w.generate("a")))
        await let_tasks_run()
        await w.registry.unload("a")
        request.cancel()
        await let_tasks_run()
        probe.goes_on.set()
        await let_tasks_run()
        assert (w.served, w.engine.loaded, w.in_store()) == ({}, {}, [])

    play(World(tmp_path, probe=probe, paused=probe.paused), scenario)
