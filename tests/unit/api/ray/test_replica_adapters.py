"""What a replica knows of its server's adapters, with molehill's own routes on a registry whose
engine can be held back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI
from support.desired import Followed
from support.server import free_port
from support.world import let_tasks_run

from molehill.api.http import adapters as routes
from molehill.api.ray import adapters
from molehill.api.ray.adapters import Refusal, ReplicaAdapters

NAME = "team/chat"
SECONDS = adapters.FILE_SECONDS


class Server:
    """Molehill's routes of adapters. replica: what a replica of it knows; registered: what that has
    told Ray Serve, in order."""

    def __init__(self, world: Followed, url: str, session: aiohttp.ClientSession) -> None:
        self.world = world
        self.registered: list[str] = []
        self.replica = ReplicaAdapters(
            url, {}, self.source_of, lambda: session, self.register, follows_file=True
        )

    def source_of(self, name: str) -> str | None:
        return {NAME: "source-1", "third": "source-3"}.get(name)

    async def register(self, name: str) -> None:
        self.registered.append(name)
        self.replica.registered(name)

    def serving(self) -> set[str]:
        return {generation.name for generation in self.world.registry}

    async def ask(self, name: str = NAME) -> Refusal | None:
        """As a request does; where it is not refused, the server has the adapter."""
        async with self.replica.held(name, ()) as refusal:
            assert refusal is not None or name in self.serving() or self.source_of(name) is None
            return refusal


Scenario = Callable[[Server], Awaitable[None]]
Play = Callable[[Scenario], None]


@asynccontextmanager
async def running(world: Followed) -> AsyncIterator[Server]:
    app = FastAPI()
    app.include_router(routes.loading)
    app.include_router(routes.router)
    app.state.molehill = SimpleNamespace(
        registry=world.registry,
        sources=world.sources,
        adapters_file=world.file,
        routed_experts=None,
    )
    port = free_port()
    http = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    task = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.001)
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(world, f"http://127.0.0.1:{port}", session)
    finally:
        http.should_exit = True
        await task


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr(adapters, "FILE_SECONDS", 0)

    async def run(scenario: Scenario) -> None:
        world = Followed(tmp_path / "world")
        world.put_as(1)
        world.put_as(3)
        async with running(world) as server:
            await asyncio.wait_for(scenario(server), 20)

    return lambda scenario: asyncio.run(run(scenario))


def test_requests_wait_for_a_load_that_another_began(play: Play) -> None:
    """The server lists it from the load's start on, and answers 404 until its end."""

    async def scenario(server: Server) -> None:
        engine = server.world.engine
        engine.proceed.clear()
        asked = [asyncio.create_task(server.ask()) for _ in range(3)]
        while not engine.calls:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(server.ask()) for _ in range(3)]
        await let_tasks_run()
        assert not any(task.done() for task in asked)
        engine.proceed.set()
        assert await asyncio.gather(*asked) == [None] * 6
        assert len(engine.calls) == 1

    play(scenario)


def test_an_evicted_adapter_stays_while_a_request_needs_it(play: Play) -> None:
    async def scenario(server: Server) -> None:
        async with server.replica.held(NAME, ()):
            server.replica.evict(NAME)
            await let_tasks_run()
            assert server.serving() == {NAME}
        while server.serving():
            await asyncio.sleep(0.001)
        # It comes back for the next, who may be there before it is gone.
        await server.ask()
        server.replica.evict(NAME)
        assert await server.ask() is None
        await let_tasks_run()
        # Named again, it is registered again.
        assert server.serving() == {NAME}
        assert server.registered == [NAME] * 3

    play(scenario)


def test_what_the_server_has_lost_is_loaded_again(play: Play) -> None:
    async def scenario(server: Server) -> None:
        await server.ask()
        await server.world.registry.unload(NAME)
        server.replica.look_again(NAME)
        assert await server.ask() is None
        assert server.serving() == {NAME}

    play(scenario)


@pytest.mark.slow
def test_what_the_adapters_file_wants_is_the_servers_to_load(play: Play) -> None:
    """Another replica is asked meanwhile: it is no 404, and nothing else is loaded for it."""

    async def scenario(server: Server) -> None:
        world = server.world
        world.write(world.entry("third", 4) | {"source": "source-9"})
        await world.until(lambda: "third" in world.errors())
        refusal = await server.ask("third")
        assert refusal is not None
        assert (refusal.head.status, b"third" in refusal.body) == (503, True)
        world.write(world.entry("third", 4))
        await world.until(lambda: world.states() == {"third": "converged"})
        (digest,) = [generation.digest for generation in world.registry]
        assert await server.ask("third") is None
        server.replica.evict("third")
        await let_tasks_run()
        # Nothing that a request had loaded: it stays.
        assert [generation.digest for generation in world.registry] == [digest]

    play(scenario)


@pytest.mark.slow
def test_a_name_that_was_just_put_into_the_file_is_waited_for(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other servers may have looked already, so that a client knows it."""
    monkeypatch.setattr(adapters, "FILE_SECONDS", SECONDS)

    async def scenario(server: Server) -> None:
        world = server.world
        world.write(world.entry("new", 4))
        world.engine.proceed.clear()
        asked = asyncio.create_task(server.ask("new"))
        await let_tasks_run()
        await world.until(lambda: world.states() == {"new": "pending"})
        refusal = await asked
        assert refusal is not None
        assert refusal.head.status == 503
        world.engine.proceed.set()
        assert await server.ask("new") is None
        assert server.serving() == {"new"}

    play(scenario)


def test_what_cannot_be_loaded_is_refused_as_the_server_does(play: Play) -> None:
    async def scenario(server: Server) -> None:
        (server.world.root / "source-1").rename(server.world.root / "gone")
        refusal = await server.ask()
        assert refusal is not None
        assert refusal.head.status == 404
        # The server's own answer: it has no such name.
        assert await server.ask("nobody") is None
        assert not server.registered
        assert not server.replica._adapters

    play(scenario)
