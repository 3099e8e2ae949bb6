"""Which adapters a replica's server has, of those that requests name."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp

from molehill.api.ray.requests import Head, Headers, end_to_end, error_body

logger = logging.getLogger("ray.serve")

OK, NOT_FOUND, BUSY, UNAVAILABLE = 200, 404, 429, 503
# Between two looks at a load that somebody else began, and two tries where others take all places.
PAUSE_SECONDS = 0.2
# In which a server has looked at a file of its machine again.
FILE_SECONDS = 1.5


@dataclass(frozen=True)
class Refusal:
    """What a client gets whose adapter cannot be served."""

    head: Head
    body: bytes


@dataclass(eq=False)
class ServerAdapter:
    """One adapter of the server. lock: held while it is loaded or unloaded.

    serving: whether the server answers for it. loaded: whether that is because of a request, so
    that it is to be unloaded. requests: that need it, and whose answers have not begun. evicted:
    whether Ray Serve has given its place to another.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    serving: bool = False
    loaded: bool = False
    requests: int = 0
    evicted: bool = False


class ReplicaAdapters:
    """Loads what a request names before the server gets the request, and unloads what Ray Serve has
    evicted once no request needs it.

    What the adapters file wants is its server's to load, and stays.
    """

    def __init__(
        self,
        url: str,
        admin: Mapping[str, str],
        source_of: Callable[[str], str | None],
        client: Callable[[], aiohttp.ClientSession],
        register: Callable[[str], Awaitable[object]],
        follows_file: bool = False,
    ) -> None:
        """url, admin: of the server, see ServerProcess. source_of: see RaySettings. register: tells
        Ray Serve that the replica has an adapter. follows_file: whether the server has an adapters
        file."""
        self._url = f"{url}/v1/adapters"
        self._admin = admin
        self._source_of = source_of
        self._client = client
        self._register = register
        self._follows_file = follows_file
        self._adapters: dict[str, ServerAdapter] = {}
        self._unloads: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def held(self, name: str, headers: Headers) -> AsyncIterator[Refusal | None]:
        """Within, the server has the adapter, or the request is to be refused: by what this gives,
        or, where that is None, by the server.

        headers: the request's. Nothing is loaded for one without a key that the server takes.
        Raises aiohttp.ClientError.
        """
        adapter = self._adapters.setdefault(name, ServerAdapter())
        adapter.requests += 1
        try:
            yield await self._bring(name, adapter, headers)
        finally:
            adapter.requests -= 1
            self._let_go(name, adapter)

    def look_again(self, name: str) -> None:
        """The server has answered that it does not have it."""
        if name in self._adapters:
            self._adapters[name].serving = False

    def registered(self, name: str) -> None:
        """Ray Serve counts it."""
        if name in self._adapters:
            self._adapters[name].evicted = False

    def evict(self, name: str) -> None:
        """Ray Serve counts it no more."""
        adapter = self._adapters.get(name)
        if adapter is not None:
            adapter.evicted = True
            self._let_go(name, adapter)

    async def _bring(self, name: str, adapter: ServerAdapter, headers: Headers) -> Refusal | None:
        if not adapter.serving:
            # Of requests that come at once, one loads it and the others wait.
            async with adapter.lock:
                if not adapter.serving:
                    refusal = await self._find(name, adapter, headers)
                    if refusal is not None:
                        return refusal
        if adapter.serving:
            await self._register(name)
        return None

    async def _find(self, name: str, adapter: ServerAdapter, headers: Headers) -> Refusal | None:
        key = {field: value for field, value in headers if field.lower() == "authorization"}
        status, state = await self._look(name, key)
        while state == "loading":
            await asyncio.sleep(PAUSE_SECONDS)
            status, state = await self._look(name, key)
        adapter.serving = state == "serving"
        if status not in (OK, NOT_FOUND) or adapter.serving:
            return None
        if await self._is_wanted(name):
            return unavailable(name)
        source = self._source_of(name)
        refusal = None if source is None else await self._load(name, source)
        adapter.serving = adapter.loaded = source is not None and refusal is None
        if not adapter.serving and await self._is_wanted(name, FILE_SECONDS):
            # Another server may have looked before.
            return unavailable(name)
        return refusal

    async def _look(self, name: str, headers: Mapping[str, str]) -> tuple[int, str | None]:
        """The status of the answer, and the adapter's state."""
        async with self._client().get(f"{self._url}/{quote(name)}", headers=headers) as answer:
            shown: dict[str, Any] = await answer.json() if answer.status == OK else {}
            return answer.status, shown.get("state")

    async def _is_wanted(self, name: str, seconds: float = 0) -> bool:
        """By the adapters file, in so many seconds."""
        if not self._follows_file:
            return False
        await asyncio.sleep(seconds)
        async with self._client().get(self._url, headers=self._admin) as answer:
            shown: dict[str, Any] = await answer.json() if answer.status == OK else {}
        entries = (shown.get("desired") or {}).get("data", ())
        return any(entry["name"] == name for entry in entries)

    async def _load(self, name: str, source: str) -> Refusal | None:
        body = {"name": name, "source": source}
        while True:
            post = self._client().post(self._url, json=body, headers=self._admin)
            async with post as answer:
                if answer.status < 400:
                    return None
                if answer.status != BUSY:
                    return Refusal(head_of(answer), await answer.read())
            await asyncio.sleep(PAUSE_SECONDS)

    def _let_go(self, name: str, adapter: ServerAdapter) -> None:
        if adapter.requests or adapter.lock.locked():
            return
        if adapter.evicted and adapter.loaded:
            task = asyncio.get_running_loop().create_task(self._unload(name, adapter))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)
        elif not adapter.serving:
            self._adapters.pop(name, None)

    async def _unload(self, name: str, adapter: ServerAdapter) -> None:
        """Requests that run on it finish."""
        async with adapter.lock:
            if adapter.requests or not adapter.evicted:
                return
            adapter.serving = adapter.loaded = False
            try:
                delete = self._client().delete(f"{self._url}/{quote(name)}", headers=self._admin)
                async with delete as answer:
                    if answer.status >= 400 and answer.status != NOT_FOUND:
                        logger.warning("%s was not unloaded: %s", json.dumps(name), answer.status)
            except aiohttp.ClientError as error:
                logger.warning("%s was not unloaded: %s", json.dumps(name), error)
        self._let_go(name, adapter)


def unavailable(name: str) -> Refusal:
    """Another replica may have it."""
    message = f"the adapter {name!a} is not loaded yet, or failed to load"
    body = json.dumps(error_body(message, "ServiceUnavailableError", UNAVAILABLE)).encode()
    headers = (("Content-Type", "application/json"), ("Retry-After", "1"))
    return Refusal(Head(UNAVAILABLE, headers), body)


def head_of(response: aiohttp.ClientResponse) -> Head:
    return Head(response.status, end_to_end(response.headers.items()))
