"""Serves what is put into an adapter root, under the name of its directory.

A directory counts as finished when nothing in it has changed for a while and it is a whole, valid
adapter. Half of one is refused by its reader, and tried again when it has changed. What is refused
for want of room, and not for what it holds, is tried again by itself.

Not by watchfiles: most looks follow no change of a file, but time that has passed, room or a name
that has become free, or a root that has come back; roots on network file systems report nothing.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from molehill.api.adapters import names
from molehill.api.adapters.backoff import Backoff
from molehill.api.adapters.errors import (
    BadNameError,
    ForbiddenPathError,
    GenerationMismatchError,
    MergedIntoBaseError,
    NoEffectError,
    RequestError,
    SourceChangedError,
)
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.source import fingerprint
from molehill.api.sources.fetch import Sources
from molehill.api.sources.roots import AdapterRoots
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.formats.registry import config_files

logger = logging.getLogger("vllm.molehill")

PERIOD_SECONDS = 1.0
QUIET_SECONDS = 2.0

# Between two tries of what there was no room for; it doubles.
FIRST_PAUSE_SECONDS = 2.0
LAST_PAUSE_SECONDS = 60.0

# Somebody else was quicker, or is still writing: the next poll decides anew.
UNTIL_NEXT_POLL = (GenerationMismatchError, SourceChangedError)

# What only other files, or another name, can put right.
FINAL = (AdapterError, BadNameError, ForbiddenPathError, MergedIntoBaseError, NoEffectError)


@dataclass
class WatchedDirectory:
    """A directory as it was last. mark: its fingerprint, and `since` when it has been that, seconds
    of the monotonic clock. backoff: when it is tried again, unless it is done: it serves, or never
    will.
    """

    mark: str
    since: float
    backoff: Backoff = field(
        default_factory=lambda: Backoff(FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS)
    )
    done: bool = False


class Watcher:
    """Looks at the roots again and again; file systems that report changes are not relied on."""

    def __init__(self, roots: AdapterRoots, sources: Sources, registry: AdapterRegistry) -> None:
        self._roots = roots
        self._sources = sources
        self._registry = registry
        self._seen: dict[str, WatchedDirectory] = {}
        self._errors: dict[Path, str] = {}

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                # Whatever it is, what appears next is served all the same.
                logger.exception("The adapter roots could not be looked at")
                self._registry.events.task_failed("watch")
            await asyncio.sleep(PERIOD_SECONDS)

    async def poll(self) -> None:
        """Loads every directory that has become finished since the last poll."""
        marks = await asyncio.to_thread(self._marks)
        now = time.monotonic()
        for name in self._seen.keys() - marks.keys():
            await self._dismiss(name)
        for name, mark in marks.items():
            seen = self._seen.get(name)
            if seen is None or seen.mark != mark:
                seen = self._seen[name] = WatchedDirectory(mark, now)
            is_quiet = now - seen.since >= QUIET_SECONDS and seen.backoff.is_due
            if is_quiet and not seen.done and self._is_free(name) and not self._registry.loads.busy:
                await self._load(name, seen)

    def _marks(self) -> dict[str, str]:
        """Fingerprints of the adapters right below the roots."""
        entries, errors = self._roots.entries()
        marks = {}
        for name, directory in entries.items():
            try:
                # One without a config holds other directories, or has just begun to fill.
                if any((directory / config).is_file() for config in config_files()):
                    names.check(name, base_models=())
                    marks[name] = fingerprint(directory)
            except (OSError, BadNameError) as error:
                errors[directory] = str(error)
        for path, why in errors.items():
            if self._errors.get(path) != why:
                logger.warning("Adapter root: %a is not watched: %a", str(path), why)
        self._errors = errors
        return marks

    async def _dismiss(self, name: str) -> None:
        """Of a directory that is gone. What it served goes on; what it was refused for is over."""
        del self._seen[name]
        failure = self._registry.failures.get(name)
        if failure is not None and failure.source == name:
            await self._registry.dismiss(name)

    def _is_free(self, name: str) -> bool:
        """A name that somebody gave to another source is not taken away from it."""
        served = self._registry.get(name)
        return served is None or served.status.source.label == name

    async def _load(self, name: str, seen: WatchedDirectory) -> None:
        served = self._registry.get(name)
        if served is not None and served.status.source.fingerprint == seen.mark:
            seen.done = True
            return
        # What is new takes nobody's place in the workers before it is asked for; what takes the
        # place of other weights has to prove itself first.
        options = LoadOptions(
            expected=None if served is None else served.digest, eager=served is not None
        )
        # As it was asked for, where a client loaded it: its files do not say.
        source = None if served is None else served.status.source
        asked = (
            (None, False, None)
            if source is None
            else (source.lora_b_layout, source.base_is_residual, source.non_granular_after)
        )
        try:
            await self._registry.load(name, name, self._sources.fetch(name, *asked), options)
            seen.done = True
        except UNTIL_NEXT_POLL:
            return
        except Exception as error:
            self._refused(name, seen, error)

    def _refused(self, name: str, seen: WatchedDirectory, error: Exception) -> None:
        if isinstance(error, RequestError | AdapterError):
            logger.warning("Adapter root: %s is not served: %s", name, error)
            seen.done = isinstance(error, FINAL)
        else:
            logger.exception("Adapter root: %s could not be loaded", name)
        seen.backoff.postpone()
        self._registry.names.fail(name, name, error)
