"""What a server remembers of the one before it, and how it takes that up again.

The store holds the bytes that were served, so a restarted server serves the same generations
whatever has become of their sources meanwhile; a source that changed is reported. Where the store
lost a copy, the source must still have the very same content.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter

from molehill.api.adapters.chat import digest_of
from molehill.api.adapters.errors import (
    NotLoadedError,
    RequestError,
    SourceChangedError,
    StoreError,
)
from molehill.api.adapters.generation import Generation, Loaded, Loading
from molehill.api.adapters.ingest import Fetch, ReadAdapter
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.source import Source, local
from molehill.api.adapters.store import AdapterStore, chat_name
from molehill.api.sources.fetch import Sources
from molehill.api.sources.manifest import Entry, Manifest
from molehill.api.sources.uploads import UPLOAD
from molehill.engine.adapter.errors import AdapterError

logger = logging.getLogger("vllm.molehill")

# Between two tries where clients' loads take all places.
PAUSE_SECONDS = 0.1

CHANGED = "the source has other content now; what was loaded is served"
GONE = "the source cannot be read any more; what was loaded is served"


class Restore:
    """Keeps the manifest, and loads what it names. ready: whether that is done.

    manifest: None for a server that remembers nothing.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        store: AdapterStore,
        sources: Sources,
        read: ReadAdapter,
        manifest: Manifest | None,
    ) -> None:
        """Raises ManifestError."""
        self._registry = registry
        self._store = store
        self._sources = sources
        self._read = read
        self._manifest = manifest
        entries = [] if manifest is None else manifest.read()
        # What the manifest names and nothing serves.
        self._absent = {entry.name: entry for entry in entries}
        for entry in entries:
            registry.names.await_load(Loading(entry.name, entry.source))
        self._writing = asyncio.Lock()
        self._on_disk = entries
        self.ready = False
        if manifest is not None:
            chats = {chat_name(entry.chat) for entry in entries if entry.chat}
            store.sweep({entry.generation for entry in entries} | chats)
            registry.names.changed = self._remember

    async def run(self) -> None:
        """Loads every remembered adapter, one after the other, then looks at their sources."""
        restored: list[tuple[Entry, Generation]] = []
        try:
            for entry in list(self._absent.values()):
                # What the command line or a client has loaded since is newer, or deleted.
                if entry.name in self._registry.names.awaited:
                    generation = await self._restore(entry)
                    if generation is not None:
                        restored.append((entry, generation))
        except Exception as error:
            self._abort(error)
        await self._remember()
        self.ready = True
        for entry, generation in restored:
            await self._check_source(entry, generation)

    def _abort(self, error: Exception) -> None:
        """A fault of the restart's own: what it did not come to is reported, not awaited for
        ever."""
        logger.error("The restart broke off", exc_info=error)
        self._registry.events.task_failed("restart")
        for name, loading in self._registry.names.awaited.items():
            self._registry.names.fail(name, loading.source, error)

    async def _restore(self, entry: Entry) -> Generation | None:
        name = entry.name
        try:
            return (await self._load_entry(entry)).generation
        except NotLoadedError:
            logger.info("Adapter %s: a client was quicker than the restart", name)
        except Exception as error:
            # Whatever it is, the others are served all the same.
            logger.error("Adapter %s is not served after the restart: %s", name, error)
            self._registry.names.fail(name, entry.source, error, entry.desired)
        return None

    async def _load_entry(self, entry: Entry) -> Loaded:
        """From the copy, else from the source."""
        copy = Source(
            self._store.path(entry.generation),
            entry.source,
            entry.fingerprint,
            lora_b_layout=entry.layout,
            base_is_residual=entry.base_is_residual,
            non_granular_after=entry.non_granular_after,
            canonical=True,
            mix=entry.mix,
            chat=entry.chat,
        )
        options = LoadOptions(
            pinned=entry.pinned,
            content=entry.generation,
            allow_noop=entry.probed,
            eager=entry.pinned,
            when_not_invoked=entry.not_invoked,
            chat=entry.chat or None,
            limits=entry.limits,
        )
        if copy.directory.is_dir():
            try:
                return await self._load(entry, local(copy), options)
            except (AdapterError, SourceChangedError):
                logger.warning("Adapter %s: its copy is damaged", entry.name)
        # Of what nobody can be asked for again.
        if entry.mix is not None:
            raise StoreError(f"{entry.name}: the store lost the copy of this mix; make it again")
        if entry.source.startswith(UPLOAD):
            raise StoreError(
                f"{entry.name}: the store lost the copy of what was sent; send its files again"
            )
        fetch = self._sources.fetch(entry.source, *entry.asked)
        return await self._load(entry, fetch, options)

    async def _load(self, entry: Entry, fetch: Fetch, options: LoadOptions) -> Loaded:
        while self._registry.loads.busy:
            # With clients' loads; clients that were refused wait longer before they try again.
            await asyncio.sleep(PAUSE_SECONDS)
        checked = self._while_awaited(entry, fetch)
        return await self._registry.load(entry.name, entry.source, checked, options)

    @contextmanager
    def _while_awaited(self, entry: Entry, fetch: Fetch) -> Iterator[Source]:
        """Entered under the name's lock, which whoever loads or deletes the name needs too."""
        if entry.name not in self._registry.names.awaited:
            raise NotLoadedError(
                f"The lora adapter {entry.name!a} was loaded or deleted meanwhile."
            )
        with fetch as source:
            yield replace(source, desired=entry.desired)

    async def _check_source(self, entry: Entry, generation: Generation) -> None:
        source = generation.status.source
        try:
            note = await self._registry.intake.alone(self._compare, entry)
        except Exception:
            logger.exception("The source of adapter %s could not be looked at", entry.name)
            return
        # Somebody may have loaded the same content again, from elsewhere.
        if note is not None and generation.status.source is source:
            generation.status.set_source(generation.status.source, note)
            logger.warning("Adapter %s: %s", entry.name, note)

    def _compare(self, entry: Entry) -> str | None:
        """Only a directory can change: a repository is named with its commit, and a URL is asked
        for again when somebody loads it."""
        if not entry.fingerprint:
            return None
        try:
            with self._sources.fetch(entry.source) as source:
                if source.fingerprint == entry.fingerprint:
                    return None
                digest = self._read(source.directory, *entry.asked).digest
                same = digest == entry.generation and self._has_chat(source, entry.chat)
                return None if same else CHANGED
        except (AdapterError, RequestError, OSError):
            return GONE

    def _has_chat(self, source: Source, digest: str) -> bool:
        """Whether the source's adapter is talked to so, or may be. Raises AdapterError, OSError."""
        if not digest:
            return True
        chat = self._registry.intake.chat_of(source)
        return chat is not None and digest in (chat.digest, digest_of(chat.tokens_alone))

    async def _remember(self) -> None:
        """Returns when what holds now is on disk, or could not be written."""
        if self._manifest is None:
            return
        async with self._writing:
            # What came while one was written goes to disk together, with whoever is next.
            entries = self._entries()
            if entries == self._on_disk:
                return
            if await self._write(self._manifest, entries):
                self._on_disk = entries
            else:
                self._registry.events.manifest_failed()

    async def _write(self, manifest: Manifest, entries: list[Entry]) -> bool:
        """Whether it is on disk. Raises nothing: what has been loaded or unloaded is, whether or
        not it is remembered."""
        try:
            return await asyncio.to_thread(manifest.write, entries)
        except Exception:
            logger.exception("The manifest could not be written; a restart would not know this")
            return False

    def _entries(self) -> list[Entry]:
        awaited = self._registry.names.awaited.keys() | self._registry.names.failures.keys()
        self._absent = {name: entry for name, entry in self._absent.items() if name in awaited}
        served = [
            Entry(
                generation.name,
                generation.digest,
                generation.status.source.label,
                generation.status.source.fingerprint,
                generation.status.slot.pinned,
                probed=generation.status.check is None,
                lora_b_layout=generation.status.source.lora_b_layout or "",
                base_is_residual=generation.status.source.base_is_residual,
                non_granular_after=generation.status.source.non_granular_after,
                when_not_invoked=generation.status.when_not_invoked or "",
                mix=generation.status.source.mix,
                desired=generation.status.source.desired,
                chat=digest_of(generation.content.chat),
                limits=generation.status.traffic.limits,
            )
            for generation in self._registry
            if generation.status.source.remembered
        ]
        return sorted([*served, *self._absent.values()], key=attrgetter("name"))
