"""Requests that another API process answers: the one that owns the registry, over a Unix socket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from molehill.api.followers.owner import OwnerGoneError
from molehill.api.http import errors

# Of one connection, not of what it carries.
HOP_BY_HOP = {
    *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"),
    *("proxy-authenticate", "proxy-authorization", "proxy-connection"),
}
# What this process's middleware does itself, and would be done twice.
TO_OWNER = {*HOP_BY_HOP, "origin"}
TO_CLIENT = {*HOP_BY_HOP, "x-request-id"}

# What aiohttp would add.
NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class ClientGoneError(Exception):
    """Before its request was at an end."""


class ForwardedBody:
    """A request's body, on its way; `empty` where it has none. receive: the ASGI server's."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        names = {name for name, _ in scope["headers"]}
        self.empty = names.isdisjoint((b"content-length", b"transfer-encoding"))
        self._receive = receive
        self._read = asyncio.Event()
        if self.empty:
            self._read.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self._read.set()

    async def disconnected(self) -> None:
        """Returns when the client goes, once it has sent all of it."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Forwarder:
    """An ASGI app that has the owner answer. path: of its socket.

    The owner sees the client's own request, its keys too, and that the client has gone.
    """

    def __init__(self, path: Path) -> None:
        # Answers may take as long as they take, and are passed on as they are.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(path), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=NOT_ADDED,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = ForwardedBody(scope, receive)
        answering = asyncio.ensure_future(self._answer(scope, body, send))
        leaving = asyncio.ensure_future(body.disconnected())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()
        await asyncio.wait((answering,))
        if not answering.cancelled():
            answering.result()

    async def _answer(self, scope: Scope, body: ForwardedBody, send: Send) -> None:
        begun = False
        try:
            async with self._session.request(
                scope["method"],
                url_of(scope),
                headers=headers_of(scope),
                data=None if body.empty else aiter(body),
                allow_redirects=False,
            ) as answer:
                begun = True
                await send(start_of(answer))
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body"})
        except (aiohttp.ClientError, OSError):
            # Or the client has gone, to whom nothing is sent then.
            if begun:
                raise
            await send_owner_gone(scope, send)

    async def close(self) -> None:
        await self._session.close()


def url_of(scope: Scope) -> URL:
    path = scope.get("raw_path") or scope["path"].encode()
    query = b"?" + scope["query_string"] if scope.get("query_string") else b""
    return URL(f"http://owner{(path + query).decode('latin-1')}", encoded=True)


def headers_of(scope: Scope) -> list[tuple[str, str]]:
    headers = (
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
    )
    return [(name, value) for name, value in headers if name.lower() not in TO_OWNER]


def start_of(answer: aiohttp.ClientResponse) -> Message:
    headers = [
        (name.lower(), value)
        for name, value in answer.raw_headers
        if name.decode("latin-1").lower() not in TO_CLIENT
    ]
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


async def send_owner_gone(scope: Scope, send: Send) -> None:
    """The answer where nobody can say what is served."""

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    error = OwnerGoneError()
    status = errors.status_of(error)
    body = errors.body(str(error), error.kind, status)
    await JSONResponse(body, status.value)(scope, nothing, send)
