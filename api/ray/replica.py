"""A replica: a server, and the adapters that requests had it load."""

import json
import logging
import os
import urllib.request
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

import aiohttp
from ray import serve

from molehill.api.ray.requests import Asked, Head, Headers, end_to_end
from molehill.api.ray.server_process import ServerProcess
from molehill.api.ray.settings import RaySettings

logger = logging.getLogger("ray.serve")

NOT_FOUND = 404
# An adapter may be unloaded between its load and its first request.
ATTEMPTS = 2
UNLOAD_SECONDS = 10


class Replica:
    """Ray Serve prefers a replica of which `serve.multiplexed` knows that it has an adapter."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        # By name, of those that requests have named: whether the replica loaded it.
        self._adapters: dict[str, bool] = {}
        self._session: aiohttp.ClientSession | None = None

        async def register(name: str) -> RegisteredAdapter:
            return RegisteredAdapter(self, name)

        multiplexed = serve.multiplexed(
            max_num_models_per_replica=settings.max_adapters_per_replica
        )
        self._register = multiplexed(register)
        self._server = ServerProcess(settings)
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
        for attempt in range(ATTEMPTS):
            if adapter is not None:
                refusal = await self._bring(adapter, asked.headers)
                if refusal is not None:
                    yield refusal[0]
                    yield refusal[1]
                    return
            async with self._send(asked) as response:
                if response.status == NOT_FOUND and attempt == 0 and await self._lost(adapter):
                    continue
                yield head_of(response)
                async for chunk in response.content.iter_any():
                    yield chunk
            return

    async def _bring(self, adapter: str, headers: Headers) -> tuple[Head, bytes] | None:
        """Loads an adapter that the server does not have, and tells Ray Serve of it.

        Returns what a client gets whose adapter cannot be loaded. Nothing is loaded for a request
        without a key that the server takes; it goes on to be refused.
        """
        if adapter not in self._adapters:
            url = f"{self._server.url}/v1/adapters"
            key = {name: value for name, value in headers if name.lower() == "authorization"}
            status = await self._status(adapter, key)
            source = self._settings.source_of(adapter)
            if status == NOT_FOUND and source is not None:
                body = {"name": adapter, "source": source}
                post = self._client().post(url, json=body, headers=self._server.admin)
                async with post as loaded:
                    if loaded.status >= 400:
                        return head_of(loaded), await loaded.read()
            elif status != 200:
                return None
            # Of requests that come at once, one loads it.
            self._adapters[adapter] = self._adapters.get(adapter, False) or status == NOT_FOUND
        await self._register(adapter)
        return None

    async def _lost(self, adapter: str | None) -> bool:
        """Whether the server has it no more, so that it has to be loaded again."""
        if adapter is None or await self._status(adapter, self._server.admin) != NOT_FOUND:
            return False
        self._adapters.pop(adapter, None)
        return True

    async def _status(self, adapter: str, headers: Mapping[str, str]) -> int:
        url = f"{self._server.url}/v1/adapters/{quote(adapter)}"
        async with self._client().get(url, headers=headers) as known:
            return known.status

    def unload(self, adapter: str) -> None:
        """Those that the adapters file wants stay; requests that run finish."""
        if not self._adapters.pop(adapter, False):
            return
        request = urllib.request.Request(
            f"{self._server.url}/v1/adapters/{quote(adapter)}",
            method="DELETE",
            headers=self._server.admin,
        )
        try:
            urllib.request.urlopen(request, timeout=UNLOAD_SECONDS).close()
        except OSError as error:
            logger.warning("adapter %s was not unloaded: %s", json.dumps(adapter), error)

    def _send(self, asked: Asked) -> "aiohttp.client._RequestContextManager":
        return self._client().request(
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

    def __init__(self, replica: Replica, name: str) -> None:
        self._replica: Replica | None = replica
        self._name = name

    def __del__(self) -> None:
        """Called by Ray Serve, and then by Python."""
        replica, self._replica = self._replica, None
        if replica is not None:
            replica.unload(self._name)


def head_of(response: aiohttp.ClientResponse) -> Head:
    return Head(response.status, end_to_end(response.headers.items()))
