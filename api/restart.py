"""What a server remembers of the one before it, and how it takes that up again.

The store holds the bytes that were served, so a restarted server serves the same generations
whatever has become of their sources meanwhile; a source that changed is reported. Where the store
lost a copy, the source must still have the very same content.
"""

import asyncio
import logging

from molehill.api.errors import RequestError
from molehill.api.generation import Failure, Generation
from molehill.api.manifest import Entry, Manifest
from molehill.api.paths import Source
from molehill.api.registry import AdapterRegistry, Reader
from molehill.api.sources import Sources, local
from molehill.api.store import AdapterStore
from molehill.api.terms import Terms
from molehill.engine.errors import AdapterError

logger = logging.getLogger("vllm.molehill")

CHANGED = "the source has other content now; what was loaded is served"
GONE = "the source cannot be read any more; what was loaded is served"


class Restart:
    """Keeps the manifest, and loads what it names. ready: whether that is done.

    manifest: None for a server that remembers nothing.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        store: AdapterStore,
        sources: Sources,
        read: Reader,
        manifest: Manifest | None,
    ) -> None:
        """Raises ManifestError."""
        self._registry = registry
        self._store = store
        self._sources = sources
        self._read = read
        self._manifest = manifest
        entries = [] if manifest is None else manifest.read()
        self._pending = {entry.name: entry for entry in entries}
        self._failed: dict[str, Entry] = {}
        self._writing = asyncio.Lock()
        self.ready = False
        if manifest is not None:
            store.sweep({entry.generation for entry in entries})
            registry.changed = self._remember

    async def run(self) -> None:
        """Loads every remembered adapter, one after the other, then looks at their sources."""
        restored = []
        for entry in list(self._pending.values()):
            # What the command line or a client has loaded under the name since is newer.
            if self._registry.get(entry.name) is None:
                generation = await self._restore(entry)
                if generation is not None:
                    restored.append((entry, generation))
            self._pending.pop(entry.name)
        await self._remember()
        self.ready = True
        for entry, generation in restored:
            generation.note = await asyncio.to_thread(self._compare, entry)
            if generation.note is not None:
                logger.warning("Adapter %s: %s", entry.name, generation.note)

    async def _restore(self, entry: Entry) -> Generation | None:
        copy = Source(self._store.path(entry.generation), entry.source, entry.fingerprint)
        terms = Terms(
            pinned=entry.pinned, content=entry.generation, allow_noop=True, eager=entry.pinned
        )
        try:
            if copy.directory.is_dir():
                try:
                    loaded = await self._registry.load(entry.name, entry.source, local(copy), terms)
                    return loaded.generation
                except AdapterError:
                    logger.warning("Adapter %s: its copy is damaged", entry.name)
            fetch = self._sources.fetch(entry.source)
            return (await self._registry.load(entry.name, entry.source, fetch, terms)).generation
        except Exception as error:
            # Whatever it is, the others are served all the same.
            logger.error("Adapter %s is not served after the restart: %s", entry.name, error)
            self._registry.failures[entry.name] = Failure(entry.name, entry.source, error)
            self._failed[entry.name] = entry
            return None

    def _compare(self, entry: Entry) -> str | None:
        """Only a directory can change: a repository is named with its commit, and a URL is asked
        for again when somebody loads it."""
        if not entry.fingerprint:
            return None
        try:
            with self._sources.fetch(entry.source) as source:
                if source.fingerprint == entry.fingerprint:
                    return None
                return None if self._read(source.directory).digest == entry.generation else CHANGED
        except (AdapterError, RequestError, OSError):
            return GONE

    async def _remember(self) -> None:
        if self._manifest is None:
            return
        # One after the other: the last one to write has seen every change.
        async with self._writing:
            await asyncio.to_thread(self._manifest.write, self._entries())

    def _entries(self) -> list[Entry]:
        served = [
            Entry(
                generation.name,
                generation.digest,
                generation.source.label,
                generation.source.fingerprint,
                generation.pinned,
            )
            for generation in self._registry
            if generation.source.remembered
        ]
        names = {entry.name for entry in served}
        lost = [self._failed[name] for name in self._registry.failures if name in self._failed]
        others = [entry for entry in (*self._pending.values(), *lost) if entry.name not in names]
        return [*served, *others]
