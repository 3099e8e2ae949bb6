"""Serves what is put into an adapter root, under the name of its directory.

A directory counts as finished when nothing in it has changed for a while and it is a whole, valid
adapter. Half of one is refused by its reader, and tried again when it has changed.
"""

import asyncio
import logging
import time

from molehill.api import names
from molehill.api.errors import BadNameError, BusyError, RequestError
from molehill.api.generation import Failure
from molehill.api.paths import AdapterRoots, fingerprint
from molehill.api.registry import AdapterRegistry
from molehill.api.sources import Sources
from molehill.engine.errors import AdapterError
from molehill.engine.formats import files, mixes, native

logger = logging.getLogger("vllm.molehill")

PERIOD_SECONDS = 1.0
SETTLE_SECONDS = 2.0

# A directory without one of them holds other directories, or has just begun to fill.
CONFIGS = (native.CONFIG, files.CONFIG, mixes.CONFIG)


class Watcher:
    """Looks at the roots again and again; file systems that report changes are not relied on."""

    def __init__(self, roots: AdapterRoots, sources: Sources, registry: AdapterRegistry) -> None:
        self._roots = roots
        self._sources = sources
        self._registry = registry
        # By name: the fingerprint, and since when it is that.
        self._seen: dict[str, tuple[str, float]] = {}
        self._tried: dict[str, str] = {}

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # Whatever it is, what appears next is served all the same.
                logger.exception("An adapter root could not be served")
            await asyncio.sleep(PERIOD_SECONDS)

    async def look(self) -> None:
        """Loads every directory that has become finished since the last look."""
        found = await asyncio.to_thread(self._fingerprints)
        now = time.monotonic()
        for name in self._seen.keys() - found.keys():
            self._seen.pop(name)
            self._tried.pop(name, None)
        for name, mark in found.items():
            if self._seen.get(name, ("", 0.0))[0] != mark:
                self._seen[name] = (mark, now)
            settled = now - self._seen[name][1] >= SETTLE_SECONDS
            if settled and self._tried.get(name) != mark and self._is_free(name):
                await self._load(name, mark)

    def _fingerprints(self) -> dict[str, str]:
        found = {}
        for name, directory in self._roots.entries().items():
            try:
                names.check(name, base_models=())
            except BadNameError:
                continue
            if any((directory / config).is_file() for config in CONFIGS):
                found[name] = fingerprint(directory)
        return found

    def _is_free(self, name: str) -> bool:
        """A name that somebody gave to another source is not taken away from it."""
        served = self._registry.get(name)
        return served is None or served.source.label == name

    async def _load(self, name: str, mark: str) -> None:
        served = self._registry.get(name)
        if served is not None and served.source.fingerprint == mark:
            self._tried[name] = mark
            return
        try:
            await self._registry.load(name, name, self._sources.fetch(name))
        except BusyError:
            return
        except (AdapterError, RequestError) as error:
            logger.warning("Adapter root: %s is not served: %s", name, error)
            if served is None:
                self._registry.failures[name] = Failure(name, name, error)
        self._tried[name] = mark
