"""Requests that one process forwards to another's app, over real sockets."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from molehill.api.http.forwarding import Forwarder
from molehill.api.http.unix_server import UnixServer

BIG = b"x" * 3_000_000


class Owner:
    """What is forwarded to. left: set when a client goes while it is answered."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.more = asyncio.Event()
        methods = ["GET", "POST", "DELETE"]
        self.app = Starlette(
            routes=[
                Route("/stream", self.stream),
                Route("/wait", self.wait, methods=methods),
                Route("/zipped", self.zipped),
                Route("/moved", self.moved),
                Route("/refused", self.refused, methods=methods),
                Route("/{path:path}", self.echo, methods=methods),
            ]
        )

    async def echo(self, request: Request) -> Response:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        seen = {
            "method": request.method,
            "path": request.scope["raw_path"].decode(),
            "query": request.scope["query_string"].decode(),
            "headers": request.headers.items(),
            "size": size,
        }
        return JSONResponse(seen, 207, {"X-Mine": "y"})

    async def stream(self, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await self.more.wait()
            yield b"last"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def wait(self, request: Request) -> Response:
        await request.body()
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.left.set()
        return Response()

    async def zipped(self, request: Request) -> Response:
        return Response(gzip.compress(BIG), headers={"Content-Encoding": "gzip"})

    async def moved(self, request: Request) -> Response:
        return Response(status_code=307, headers={"Location": "/zipped", "Set-Cookie": "a=b"})

    async def refused(self, request: Request) -> Response:
        """Before the body has been read."""
        return Response(status_code=413)


@asynccontextmanager
async def listening(app: ASGIApp, path: Path) -> AsyncIterator[None]:
    server = UnixServer(app, path)
    serving = await server.start()
    yield
    server.should_exit = server.force_exit = True
    await serving


Scenario = Callable[[Owner, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    async def run(scenario: Scenario) -> None:
        owner = Owner()
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "front"))
        async with listening(owner.app, tmp_path / "owner"):
            forward = Forwarder(tmp_path / "owner")
            async with (
                listening(forward, tmp_path / "front"),
                httpx.AsyncClient(transport=transport, base_url="http://front") as client,
            ):
                await scenario(owner, client)
            await forward.close()

    return lambda scenario: asyncio.run(asyncio.wait_for(run(scenario), 20))


def test_a_request_arrives_as_it_was_sent_and_the_answer_too(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(owner: Owner, client: httpx.AsyncClient) -> None:
        headers = {"Authorization": "Bearer key", "X-A": "1", "Origin": "http://page"}
        answer = await client.post("/v1/a%2Fb%20c?x=%26&y=", content=BIG, headers=headers)
        assert (answer.status_code, answer.headers["x-mine"]) == (207, "y")
        seen = answer.json()
        assert (seen["method"], seen["size"]) == ("POST", len(BIG))
        assert (seen["path"], seen["query"]) == ("/v1/a%2Fb%20c", "x=%26&y=")
        arrived = dict(seen["headers"])
        assert (arrived["authorization"], arrived["x-a"]) == ("Bearer key", "1")
        assert arrived["host"] == "front"
        # CORS is the affair of the process that the client talks to.
        assert "origin" not in arrived
        assert arrived["user-agent"] == client.headers["user-agent"]

        answer = await client.delete("/v1/adapters/a")
        seen = answer.json()
        assert (seen["method"], seen["size"]) == ("DELETE", 0)
        assert "transfer-encoding" not in dict(seen["headers"])

        async def chunks() -> AsyncIterator[bytes]:
            yield b"ab"
            yield b"cd"

        assert (await client.post("/x", content=chunks())).json()["size"] == 4

    play(scenario)


def test_answers_are_passed_on_as_they_are(play: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, client: httpx.AsyncClient) -> None:
        answer = await client.get("/zipped")
        assert (answer.content, answer.headers["content-encoding"]) == (BIG, "gzip")
        answer = await client.get("/moved")
        assert (answer.status_code, answer.headers["location"]) == (307, "/zipped")
        client.cookies.clear()
        assert "cookie" not in dict((await client.get("/x")).json()["headers"])
        assert (await client.head("/zipped")).headers["content-length"] == str(
            len(gzip.compress(BIG))
        )
        refused = await client.post("/refused", content=BIG)
        assert refused.status_code == 413

    play(scenario)


def test_a_stream_comes_as_it_is_made(play: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/stream") as answer:
            chunks = answer.aiter_raw()
            assert await anext(chunks) == b"first"
            owner.more.set()
            assert [chunk async for chunk in chunks] == [b"last"]

    play(scenario)


def test_the_owner_sees_that_a_client_has_gone(play: Callable[[Scenario], None]) -> None:
    async def scenario(owner: Owner, client: httpx.AsyncClient) -> None:
        for body in (None, b"{}"):
            owner.left.clear()
            asked: asyncio.Future[Any] = asyncio.ensure_future(
                client.post("/wait", content=body) if body else client.get("/wait")
            )
            await asyncio.sleep(0.1)
            assert not owner.left.is_set()
            asked.cancel()
            await asyncio.wait_for(owner.left.wait(), 10)

    play(scenario)


def test_nobody_answers_for_an_owner_that_has_gone(tmp_path: Path) -> None:
    async def run() -> None:
        forward = Forwarder(tmp_path / "owner")
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "front"))
        async with (
            listening(forward, tmp_path / "front"),
            httpx.AsyncClient(transport=transport, base_url="http://front") as client,
        ):
            for answer in (await client.get("/v1/models"), await client.post("/x", content=b"a")):
                assert answer.status_code == 503
                assert answer.json()["error"]["type"] == "engine_refused"
        await forward.close()

    asyncio.run(asyncio.wait_for(run(), 20))
