"""A replica: a server, and the adapters that requests had it load."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator

import aiohttp
from ray import serve

from molehill.api.ray.adapters import NOT_FOUND, Refusal, ReplicaAdapters, head_of
from molehill.api.ray.requests import Asked, Head
from molehill.api.ray.server_process import ServerProcess
from molehill.api.ray.settings import RaySettings

logger = logging.getLogger("ray.serve")


class Replica:
    """Ray Serve prefers a replica of which `serve.multiplexed` knows that it has an adapter."""

    def __init__(self, settings: RaySettings) -> None:
        self._session: aiohttp.ClientSession | None = None

        async def register(name: str) -> RegisteredAdapter:
            self._adapters.registered(name)
            return RegisteredAdapter(self._adapters, name)

        multiplexed = serve.multiplexed(
            max_num_models_per_replica=settings.max_adapters_per_replica
        )
        self._server = ServerProcess(settings)
        self._adapters = ReplicaAdapters(
            self._server.url,
            self._server.admin,
            settings.source_of,
            self._client,
            multiplexed(register),
            follows_file=settings.adapters_file is not None,
        )
        logger.info("the server is at %s", self._server.url)
        # A replica without its server is none: Ray then gives requests to the others at once.
        self._server.watch(self._end)

    async def check_health(self) -> None:
        """Raises RuntimeError, or what aiohttp does."""
        async with self._client().get(f"{self._server.url}/health") as answer:
            if answer.status != 200:
                raise RuntimeError(f"/health: found {answer.status}, expected 200")

    async def answer(self, asked: Asked, adapter: str | None) -> AsyncIterator[Head | bytes]:
        """The head, then the body as it comes. Raises aiohttp.ClientError."""
        begun = await (self._send(asked) if adapter is None else self._ask(asked, adapter))
        if isinstance(begun, Refusal):
            yield begun.head
            yield begun.body
            return
        async with begun as response:
            yield head_of(response)
            async for chunk in response.content.iter_any():
                yield chunk

    async def _ask(self, asked: Asked, adapter: str) -> aiohttp.ClientResponse | Refusal:
        begun = await self._ask_once(asked, adapter)
        if isinstance(begun, Refusal) or begun.status != NOT_FOUND:
            return begun
        # The adapters file may have taken away what the replica knew.
        begun.release()
        self._adapters.look_again(adapter)
        return await self._ask_once(asked, adapter)

    async def _ask_once(self, asked: Asked, adapter: str) -> aiohttp.ClientResponse | Refusal:
        """Held until the answer begins: then the server has admitted the request to the adapter."""
        async with self._adapters.held(adapter, asked.headers) as refusal:
            return await self._send(asked) if refusal is None else refusal

    async def _send(self, asked: Asked) -> aiohttp.ClientResponse:
        return await self._client().request(
            asked.method,
            f"{self._server.url}{asked.path}",
            data=asked.body or None,
            headers=asked.headers,
        )

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Answers may take as long as they take; bodies are passed on as they are.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
            )
        return self._session

    def _end(self, status: int) -> None:
        logger.error("the server ended with status %s, and its replica with it", status)
        os._exit(1)

    def __del__(self) -> None:
        """Ray Serve calls it when the replica's requests have ended."""
        if hasattr(self, "_server"):
            self._server.stop()


class RegisteredAdapter:
    """What `serve.multiplexed` holds of an adapter; it calls `__del__` when there are too many."""

    def __init__(self, adapters: ReplicaAdapters, name: str) -> None:
        """In the loop of the replica's requests."""
        self._adapters: ReplicaAdapters | None = adapters
        self._name = name
        self._loop = asyncio.get_running_loop()

    def __del__(self) -> None:
        """Called by Ray Serve, in another thread, and then by Python."""
        adapters, self._adapters = self._adapters, None
        if adapters is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(adapters.evict, self._name)
