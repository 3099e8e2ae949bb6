"""Requests in a process without a registry, on the generations of the one that has it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.world import FakeEngine, Play, Scenario, World, let_tasks_run

from molehill.api.adapters.chat import AdapterChat
from molehill.api.adapters.errors import LimitReachedError, UnknownModelError
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.traffic_limits import TrafficLimits
from molehill.api.followers import messages
from molehill.api.followers.followed_adapters import FollowedAdapters
from molehill.api.followers.lease_server import LeaseServer
from molehill.api.followers.messages import Welcome
from molehill.api.followers.owner import Owner, OwnerGoneError
from molehill.api.vllm.leased_calls import wrap_engine_client
from molehill.api.vllm.lora_requests import FollowedRequests, make_request
from molehill.api.vllm.request_scope import RequestScope, request_scope

CHAT = AdapterChat({"default": "{{ messages }}"}, {"eos_token": "<e>"}, (7,))


class Follower:
    """A process beside the world's: a client of the same engine, and its requests."""

    def __init__(self, w: World, owner: Owner) -> None:
        self.owner = owner
        self.engine = FakeEngine()
        self.engine.loaded = w.engine.loaded
        self.engine.more = w.engine.more
        self.caught_up = asyncio.Event()
        self.caught_up.set()
        self.adapters = FollowedAdapters(owner, make_request, self.caught_up.wait)
        self.served = FollowedRequests(self.adapters)
        wrap_engine_client(self.engine, self.adapters)

    @asynccontextmanager
    async def asking(self, name: str) -> AsyncIterator[AsyncGenerator[str, None]]:
        """A request for the name, admitted; what the engine answers."""
        request = RequestScope()
        token = request_scope.set(request)
        try:
            async with self.adapters.admitted(name, request.request) as served:
                assert served == (name in self.served)
                if not served:
                    raise UnknownModelError(name)
                lora_request = self.served[name]
                yield self.engine.generate("p", None, "id", lora_request=lora_request)
        finally:
            request.end()
            request_scope.reset(token)

    async def ask(self, name: str) -> int:
        """The id of the generation that has answered."""
        async with self.asking(name) as outputs:
            assert [output async for output in outputs] == ["first", "last"]
        return self.engine.served[-1]


@asynccontextmanager
async def following(w: World) -> AsyncIterator[Follower]:
    path = w.folder / "leases"
    await LeaseServer(w.registry, Welcome(400, 3)).listen(path)
    owner = await Owner.connect(path)
    yield Follower(w, owner)
    await owner.close()


def in_flight(generation: Generation) -> int:
    return generation.status.in_flight


def test_a_follower_is_told_the_vocabulary_and_answers_on_the_owners_generation(
    play: Play,
) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        loaded = (await w.load("a", 1)).generation
        async with following(w) as follower:
            assert follower.owner.welcome == Welcome(400, 3)
            async with follower.asking("a") as outputs:
                assert [output async for output in outputs] == ["first", "last"]
                followed = follower.adapters.generation(loaded.lora_int_id)
                assert followed is not None
                assert (followed.digest, followed.request) == (loaded.digest, loaded.request)
                assert in_flight(loaded) == 1
            await let_tasks_run()
            assert (in_flight(loaded), loaded.status.holds) == (0, set())

    play(scenario)


def test_an_unload_is_seen_as_soon_as_it_has_answered(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        async with following(w) as follower, follower.asking("a") as outputs:
            assert await anext(outputs) == "first"
            assert in_flight(await w.registry.unload("a")) == 1
            with pytest.raises(UnknownModelError):
                await follower.ask("a")
            assert w.engine.loaded == {1: "a"}
            w.engine.more.set()
            assert [output async for output in outputs] == ["last"]
        await let_tasks_run()
        assert (w.engine.loaded, w.registry.alive(), w.in_store()) == ({}, [], [])

    play(scenario)


def test_a_replaced_generation_ends_with_its_requests_in_every_process(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        async with following(w) as follower:
            async with follower.asking("a") as old:
                assert await anext(old) == "first"
                await w.load("a", 2, replace=True)
                w.engine.more.set()
                assert await follower.ask("a") == w.served["a"].lora_int_id == 2
                assert w.engine.loaded == {1: "a", 2: "a"}
                assert [output async for output in old] == ["last"]
            await let_tasks_run()
            assert w.engine.loaded == {2: "a"}

    play(scenario)


def test_requests_wait_for_a_slot_with_those_of_the_owner(
    play_in: Callable[[int, Scenario], None],
) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("b", 2)
        async with following(w) as follower:
            running = w.generate("b")
            await anext(running)
            async with follower.asking("a") as outputs:
                waiting = asyncio.ensure_future(anext(outputs))
                await let_tasks_run()
                assert w.residency.requests_waiting() == {"a": 1}
                waiting.cancel()
                await let_tasks_run()
                assert w.residency.requests_waiting() == {}
                assert w.engine.loaded == {2: "b"}
            w.engine.more.set()
            assert [output async for output in running] == ["last"]
            assert await follower.ask("a") == 1

    play_in(1, scenario)


def test_limits_count_the_requests_of_all_processes_and_refuse_each_once(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1, limits=TrafficLimits(requests_in_flight=1))
        async with following(w) as follower, follower.asking("a") as outputs:
            await anext(outputs)
            with pytest.raises(LimitReachedError):
                w.registry.admit(w.served["a"], object())
            request = RequestScope()
            token = request_scope.set(request)
            async with follower.adapters.admitted("a", request.request) as served:
                assert served
                # Where vLLM's route looks its model up, as in the owner.
                with pytest.raises(Exception, match="found 1 in flight") as refused:
                    follower.served["a"]
                assert refused.value.http_status == 429  # type: ignore[attr-defined]
                assert isinstance(request.refused, LimitReachedError)
            request_scope.reset(token)
        assert counted(w, "molehill_adapter_limit_refusals_total") == 2

    play(scenario)


def counted(w: World, name: str) -> float:
    samples = [sample for metric in w.registry.events.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def test_what_requests_count_is_counted_once(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", 1)
        async with following(w) as first, following_too(w) as second:
            for follower in (first, second, first):
                await follower.ask("a")
            await let_tasks_run()
        assert counted(w, "molehill_adapter_cache_hits_total") == 3
        assert counted(w, "molehill_adapter_wait_seconds_count") == 3

    play(scenario)


@asynccontextmanager
async def following_too(w: World) -> AsyncIterator[Follower]:
    owner = await Owner.connect(w.folder / "leases")
    yield Follower(w, owner)
    await owner.close()


def test_charged_tokens_reach_the_limit(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1, limits=TrafficLimits(tokens_per_second=10.0))
        async with following(w) as follower:
            async with follower.adapters.admitted("a", request := object()):
                lease = follower.adapters.admit(w.served["a"], request)
                lease.charge(300)
                lease.charge(700)
                lease.release()
            await let_tasks_run()
            with pytest.raises(LimitReachedError, match="tokens_per_second"):
                w.registry.admit(w.served["a"], object())

    play(scenario)


def test_a_follower_that_dies_holds_nothing(play: Play) -> None:
    async def scenario(w: World) -> None:
        generation = (await w.load("a", 1)).generation
        async with following(w) as follower, follower.asking("a") as outputs:
            await anext(outputs)
            assert (in_flight(generation), generation.status.running) == (1, 1)
            await follower.owner.close()
            await let_tasks_run()
            assert generation.status.holds == set()
            await w.registry.unload("a")
            assert w.engine.loaded == {}

    play(scenario)


def test_an_owner_that_dies_admits_nothing(play: Play) -> None:
    async def scenario(w: World) -> None:
        path = w.folder / "leases"
        connected: list[asyncio.StreamWriter] = []

        async def welcome(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            messages.write(writer, Welcome(None, 0))
            connected.append(writer)

        server = await asyncio.start_unix_server(welcome, path)
        follower = Follower(w, await Owner.connect(path))
        asked = asyncio.ensure_future(follower.ask("a"))
        await let_tasks_run()
        assert not asked.done()
        connected[0].close()
        with pytest.raises(OwnerGoneError):
            await asked
        assert follower.owner.gone.is_set()
        with pytest.raises(OwnerGoneError):
            await follower.ask("a")
        server.close()

    play(scenario)


def test_an_adapter_stays_until_the_engine_knows_that_its_request_has_ended(play: Play) -> None:
    """The engine hears of a client that has gone from the follower, and of an adapter that leaves
    from the owner."""

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        async with following(w) as follower:
            follower.caught_up.clear()
            async with follower.asking("a") as outputs:
                await anext(outputs)
                await outputs.aclose()
            await w.registry.unload("a")
            await let_tasks_run()
            assert w.engine.loaded == {1: "a"}
            follower.caught_up.set()
            await let_tasks_run()
            assert (w.engine.loaded, w.registry.alive()) == ({}, [])

    play(scenario)


def test_a_follower_has_of_an_adapter_what_its_requests_need(tmp_path: Path) -> None:
    async def scenario() -> None:
        w = World(tmp_path, read_chat=lambda _: CHAT)
        loaded = (await w.load("a", 1)).generation
        assert loaded.content.chat == CHAT
        async with following(w) as follower, follower.asking("a"):
            followed = follower.adapters.generation(1)
            assert followed is not None
            for name in ("digest", "kind", "path", "chat", "invocation_tokens"):
                assert getattr(followed.content, name) == getattr(loaded.content, name)
            for name in ("added", "token_texts", "num_bytes"):
                assert getattr(followed.content, name) == getattr(loaded.content, name)
            assert followed.created == loaded.created

    asyncio.run(asyncio.wait_for(scenario(), 20))
