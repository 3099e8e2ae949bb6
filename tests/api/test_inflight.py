"""A request and the generation that it was admitted to, until it ends."""

import asyncio
import gc

import pytest
from vllm.exceptions import VLLMNotFoundError
from world import Play, World, adapter, settle

from molehill.api.inflight import Answering, answering


def test_an_unloaded_generation_is_freed_after_its_last_request(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        streams = [w.generate("a"), w.generate("a")]
        for stream in streams:
            assert await anext(stream) == "first"
        generation = await w.registry.unload("a")
        assert generation.in_flight == 2
        assert w.served == {}
        await streams[0].aclose()
        await settle()
        assert w.engine.loaded == {1: "a"}
        w.engine.more.set()
        assert [output async for output in streams[1]] == ["last"]
        await settle()
        assert (w.engine.loaded, w.registry.alive(), w.in_store()) == ({}, [], [])

    play(scenario)


def test_a_request_resolved_before_an_unload_is_not_found(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        resolved = w.served["a"]
        await w.registry.unload("a")
        with pytest.raises(VLLMNotFoundError):
            w.engine.generate("p", None, "id", lora_request=resolved)
        assert w.engine.served == []

    play(scenario)


def test_a_request_admitted_before_an_unload_runs_to_its_end(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        w.engine.more.set()
        admitted = w.generate("a")
        assert (await w.registry.unload("a")).in_flight == 1
        assert [output async for output in admitted] == ["first", "last"]
        await settle()
        assert (w.engine.loaded, w.in_store()) == ({}, [])

    play(scenario)


def test_a_request_that_is_never_read_does_not_keep_its_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        admitted = w.generate("a")
        assert (await w.registry.unload("a")).in_flight == 1
        del admitted
        gc.collect()
        await settle()
        assert (w.engine.loaded, w.registry.alive(), w.in_store()) == ({}, [], [])

    play(scenario)


def test_samples_of_one_request_hold_their_generation_until_the_last_one_ends(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        streams = [w.generate("a") for _ in range(3)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await w.registry.unload("a")
        for stream in streams:
            assert w.engine.loaded == {1: "a"}
            await stream.aclose()
            await stream.aclose()
            await settle()
        assert w.engine.loaded == {}

    play(scenario)


def test_all_prompts_of_one_http_request_run_on_one_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        token = answering.set(Answering())
        first = w.generate("a")
        await w.load("a", 2, replace=True)
        second = w.generate("a")
        answering.reset(token)
        await asyncio.gather(anext(first), anext(second), anext(third := w.generate("a")))
        assert w.engine.served == [1, 1, 2]
        for stream in (first, second, third):
            await stream.aclose()

    play(scenario)


def test_a_request_resolved_before_a_replacement_runs_on_the_new_weights(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        resolved = w.served["a"]
        await w.load("a", 2, replace=True)
        stream = w.engine.generate("p", None, "id", lora_request=resolved)
        assert await anext(stream) == "first"
        assert w.engine.served == [2]
        await stream.aclose()

    play(scenario)


def test_a_name_loaded_again_is_another_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        old = w.generate("a")
        await anext(old)
        await w.registry.unload("a")
        await w.load("a", 1)
        assert w.served["a"].lora_int_id == 2
        assert w.engine.loaded == {1: "a", 2: "a"}
        w.engine.more.set()
        assert [output async for output in old] == ["last"]
        await settle()
        assert w.engine.loaded == {2: "a"}
        assert w.in_store() == [adapter(1).digest]

    play(scenario)


def test_base_requests_are_not_touched(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        outputs = [output async for output in w.engine.generate("p", None, "id")]
        assert outputs == ["first", "last"]
        assert w.engine.served == [0]

    play(scenario)


def test_pooling_requests_are_counted_too(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        stream = w.engine.encode("p", None, "id", lora_request=w.served["a"])
        await anext(stream)
        assert next(iter(w.registry)).in_flight == 1
        await stream.aclose()
        assert next(iter(w.registry)).in_flight == 0

    play(scenario)
