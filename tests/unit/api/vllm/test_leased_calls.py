"""A request and the generation that it was admitted to, until it ends."""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support.world import Play, World, adapter, let_tasks_run
from vllm.exceptions import VLLMNotFoundError

from molehill.api.vllm import leased_outputs, model_lookup
from molehill.api.vllm.generation_header import HEADER, GenerationHeader
from molehill.api.vllm.request_scope import RequestScope, request_scope


def test_an_unloaded_generation_is_freed_after_its_last_request(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        streams = [w.generate("a"), w.generate("a")]
        for stream in streams:
            assert await anext(stream) == "first"
        generation = await w.registry.unload("a")
        assert generation.status.in_flight == 2
        assert w.served == {}
        await streams[0].aclose()
        await let_tasks_run()
        assert w.engine.loaded == {1: "a"}
        w.engine.more.set()
        assert [output async for output in streams[1]] == ["last"]
        await let_tasks_run()
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
        assert (await w.registry.unload("a")).status.in_flight == 1
        assert [output async for output in admitted] == ["first", "last"]
        await let_tasks_run()
        assert (w.engine.loaded, w.in_store()) == ({}, [])

    play(scenario)


@pytest.mark.slow
def test_a_request_that_is_never_read_does_not_keep_its_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        admitted = w.generate("a")
        assert (await w.registry.unload("a")).status.in_flight == 1
        del admitted
        gc.collect()
        await let_tasks_run()
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
            await let_tasks_run()
        assert w.engine.loaded == {}

    play(scenario)


def test_all_prompts_of_one_http_request_run_on_one_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        token = request_scope.set(RequestScope())
        first = w.generate("a")
        await w.load("a", 2, replace=True)
        second = w.generate("a")
        request_scope.reset(token)
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
        await let_tasks_run()
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
        assert next(iter(w.registry)).status.in_flight == 1
        await stream.aclose()
        assert next(iter(w.registry)).status.in_flight == 0

    play(scenario)


class Client:
    """One HTTP request to a route, whose answer the client reads as fast as it wants."""

    def __init__(self, route: Callable[[], Any]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = asyncio.Event()
        self._app: ASGIApp = GenerationHeader(self._respond)
        self._route = route

    async def __call__(self) -> "Client":
        await self._app({"type": "http", "path": "/", "headers": []}, self._receive, self._send)
        return self

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response = await self._route()
        await response(scope, receive, send)

    async def _receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            return
        await self.reads.wait()
        self.body += message["body"]


async def joined(outputs: AsyncIterator[str]) -> str:
    return " ".join([output async for output in outputs])


def test_an_answer_of_many_calls_runs_on_one_generation_to_its_end(play: Play) -> None:
    """As in beam search, where every token is a call of its own."""

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        resolved, going_on = w.served["a"], asyncio.Event()

        async def route() -> Response:
            texts = []
            for _ in range(3):
                call = w.engine.generate("p", None, "id", lora_request=resolved)
                texts.append(await joined(call))
                await going_on.wait()
            return PlainTextResponse(", ".join(texts))

        w.engine.more.set()
        asking = asyncio.create_task(Client(route)())
        await let_tasks_run()
        old = w.registry.get("a")
        assert old is not None
        # Between two calls the engine has nothing of the request.
        assert (old.status.in_flight, old.status.running) == (1, 0)
        await w.load("a", 2, replace=True)
        await w.registry.unload("a")
        going_on.set()
        answer = await asking
        assert (answer.status, answer.body) == (200, b"first last, first last, first last")
        assert answer.headers[HEADER.lower()] == old.digest
        assert w.engine.served == [1, 1, 1]
        await let_tasks_run()
        assert (w.engine.loaded, w.registry.alive(), w.in_store()) == ({}, [], [])

    play(scenario)


def test_what_goes_on_after_the_response_is_counted_while_it_lasts(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        calls: list[Any] = []

        async def route() -> Response:
            calls.append(w.generate("a"))
            await anext(calls[0])
            return PlainTextResponse("in the background")

        await Client(route)()
        assert (await w.registry.unload("a")).status.in_flight == 1
        w.engine.more.set()
        assert await joined(calls[0]) == "last"
        await let_tasks_run()
        assert w.registry.alive() == []

    play(scenario)


def streamed(w: World, name: str) -> Callable[[], Any]:
    async def route() -> Response:
        return StreamingResponse(w.generate(name))

    return route


def streamed_late(w: World, name: str) -> Callable[[], Any]:
    """As vLLM's route for streams of Responses: it asks the engine when its stream has begun."""

    async def events() -> AsyncIterator[str]:
        yield "begun "
        async for output in w.generate(name):
            yield output

    async def route() -> Response:
        model_lookup.admit(w.registry, w.served[name])
        return StreamingResponse(events(), media_type="text/event-stream")

    return route


def test_a_stream_that_asks_late_runs_on_the_generation_in_its_header(
    play_in: Callable[[int, Any], None],
) -> None:
    async def scenario(w: World) -> None:
        old = await w.load("a", 1)
        client = Client(streamed_late(w, "a"))
        client.reads.clear()
        asking = asyncio.create_task(client())
        await let_tasks_run()
        await w.load("a", 2, replace=True)
        assert w.registry.alive()[0].status.in_flight == 1
        client.reads.set()
        w.engine.more.set()
        await asking
        assert client.headers[HEADER.lower()] == old.generation.digest
        assert client.body == b"begun firstlast"
        assert w.engine.served == [1]
        await let_tasks_run()
        assert [generation.lora_int_id for generation in w.registry.alive()] == [2]

    play_in(4, scenario)


def test_a_route_that_only_looks_the_model_up_leaves_nothing(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)

        async def route() -> Response:
            for _ in range(2):
                model_lookup.admit(w.registry, w.served["a"])
            assert w.registry.get("a").status.in_flight == 1
            return PlainTextResponse("bad request", 400)

        answer = await Client(route)()
        assert (answer.status, w.engine.served) == (400, [])
        assert w.registry.get("a").status.in_flight == 0

    play(scenario)


def test_a_client_that_stops_reading_does_not_keep_its_slot(
    play_in: Callable[[int, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leased_outputs, "PATIENCE_SECONDS", 0.01)

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("b", 2)
        client = Client(streamed(w, "b"))
        client.reads.clear()
        asking = asyncio.create_task(client())
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(joined(w.generate("a")))
        await let_tasks_run()
        # The engine still works for it.
        assert list(w.engine.loaded.values()) == ["b"]
        w.engine.more.set()
        assert await asyncio.wait_for(waiting, 5) == "first last"
        assert client.body == b""
        generation = w.registry.get("b")
        assert generation is not None
        assert (generation.status.in_flight, generation.status.running) == (1, 0)
        client.reads.set()
        await asking
        assert client.body == b"firstlast"
        assert generation.status.in_flight == 0

    play_in(1, scenario)


@pytest.mark.slow
def test_a_client_that_stops_reading_and_goes_away_ends_its_request(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leased_outputs, "PATIENCE_SECONDS", 0.01)

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        client = Client(streamed(w, "a"))
        client.reads.clear()
        asking = asyncio.create_task(client())
        await asyncio.sleep(0.05)
        client.gone.set()
        await asking
        gc.collect()
        await let_tasks_run()
        generation = w.registry.get("a")
        assert generation is not None
        assert (generation.status.in_flight, generation.status.running) == (0, 0)

    play(scenario)


@pytest.mark.parametrize("stream", [streamed, streamed_late])
def test_a_stream_that_finds_no_room_is_refused_before_it_begins(
    stream: Callable[[World, str], Callable[[], Any]], play_in: Callable[[int, Any], None]
) -> None:
    async def scenario(w: World) -> None:
        w.engine.capacity = 1
        await w.load("a", 1)
        await w.load("pinned", 2, pinned=True)
        answer = await Client(stream(w, "a"))()
        assert (answer.status, w.engine.served) == (503, [])
        assert "found 1 pinned" in json.loads(answer.body)["error"]["message"]
        assert all((g.status.in_flight, g.status.running) == (0, 0) for g in w.registry)

    play_in(4, scenario)


def test_a_stream_begins_when_its_adapter_is_there(play_in: Callable[[int, Any], None]) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("b", 2)
        running = w.generate("b")
        await anext(running)
        client = Client(streamed(w, "a"))
        asking = asyncio.create_task(client())
        await let_tasks_run()
        assert client.status == 0
        w.engine.more.set()
        await joined(running)
        await asking
        assert (client.status, client.body) == (200, b"firstlast")

    play_in(1, scenario)


def test_hits_are_counted_where_the_adapter_was_found(
    play_in: Callable[[int, Any], None],
) -> None:
    """One that yields may be gone when its request's turn comes."""

    async def scenario(w: World) -> None:
        def hits() -> tuple[int, ...]:
            samples = Counter[str]()
            for metric in w.registry.events.collect():
                for sample in metric.samples:
                    if sample.name == "molehill_adapter_cache_hits_total":
                        samples[sample.labels["tier"]] += int(sample.value)
            return samples["worker"], samples["host"]

        await w.load("a", 1)
        await w.load("b", 2)
        running = w.generate("b")
        await anext(running)
        assert hits() == (1, 0)
        waiting = []
        for name in "ab":
            waiting.append(asyncio.create_task(joined(w.generate(name))))
            await let_tasks_run()
        w.engine.more.set()
        await joined(running)
        await asyncio.gather(*waiting)
        assert hits() == (1, 2)

    play_in(1, scenario)
