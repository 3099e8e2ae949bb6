"""Serves what the operator's adapters file says, and nothing that it said before and says no more.

The file is looked at again and again. What it wants and is not served, or not as it says, is
loaded; what came from it and is wanted no more is unloaded; names that others gave are left alone.
Each name is tried on its own, again and again with growing pauses. A file that cannot be read, or
says nothing that could be served, changes nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVarTuple

from molehill.api.adapters import tasks
from molehill.api.adapters.backoff import Backoff
from molehill.api.adapters.errors import (
    BadNameError,
    BusyError,
    EngineRefusedError,
    FetchError,
    GenerationMismatchError,
    NotLoadedError,
    OutOfMemoryError,
    RequestError,
    StoreError,
)
from molehill.api.adapters.generation import Failure, Generation, failure_of
from molehill.api.adapters.ingest import Fetch
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.source import Source
from molehill.api.sources.adapters_file import LABEL, BadEntry, DesiredAdapter, DesiredSet, parse
from molehill.api.sources.fetch import Sources
from molehill.api.sources.operator_file import OperatorFile
from molehill.engine.adapter.errors import AdapterError

logger = logging.getLogger("vllm.molehill")

PERIOD_SECONDS = 1.0

# Between two tries of one adapter; it doubles.
FIRST_PAUSE_SECONDS = 2.0
LAST_PAUSE_SECONDS = 120.0

# What may be otherwise in a moment: a server that has just started waits for it before it is ready.
PASSING = (FetchError, StoreError, OutOfMemoryError, EngineRefusedError)
# Somebody else was quicker: the next look decides anew.
OVERTAKEN = (BusyError, GenerationMismatchError, NotLoadedError)


Args = TypeVarTuple("Args")


class DesiredState(StrEnum):
    """How an entry of the file stands. pending: it is loaded, or will be. failed: it is wrong, or
    was refused and is tried again."""

    CONVERGED = "converged"
    PENDING = "pending"
    FAILED = "failed"


@dataclass
class Attempt:
    """What has become of one adapter. digest: of what was loaded for it, None before. failure: why
    the last try failed; passing: whether it may be otherwise soon. backoff: when it is tried again.
    """

    adapter: DesiredAdapter
    digest: str | None = None
    failure: Failure | None = None
    passing: bool = False
    backoff: Backoff = field(
        default_factory=lambda: Backoff(FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS)
    )

    def fail(self, failure: Failure, passing: bool) -> None:
        self.failure, self.passing = failure, passing
        self.backoff.postpone()

    def succeed(self, digest: str) -> None:
        self.digest, self.failure = digest, None
        self.backoff.reset()


@dataclass(frozen=True)
class DesiredStatus:
    """One entry of the file, for clients. name: None where it cannot be read. generation: what the
    name serves now. retry_seconds: until the next try, None where none is to come."""

    name: str | None
    state: DesiredState
    source: str | None = None
    generation: str | None = None
    error_type: str | None = None
    error: str | None = None
    retry_seconds: float | None = None


class DesiredStateReconciler:
    """Has the registry converge to what a file says. error: why the last look at it was in vain.
    read_at: when it was last read and understood, Unix seconds; None before. read_failures: looks
    in vain since the start.

    ready: once every adapter of it serves, or has been refused for what it is. It stays so: what
    is served goes on whatever becomes of the file.
    """

    def __init__(self, file: OperatorFile, sources: Sources, registry: AdapterRegistry) -> None:
        self._file = file
        self._sources = sources
        self._registry = registry
        self._desired: DesiredSet | None = None
        self._content: bytes | None = None
        self._next_look = 0.0
        self._attempts: dict[str, Attempt] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._removal_errors: dict[str, Failure] = {}
        self.error: Failure | None = None
        self.read_at: float | None = None
        self.read_failures = 0
        self.started_at = time.time()
        self.ready = False

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                # Whatever it is, what serves goes on, and the next look may do better.
                logger.exception("The adapters file could not be followed")
                self._registry.events.task_failed("adapters_file")
            await asyncio.sleep(PERIOD_SECONDS)

    async def poll(self) -> None:
        """Looks at the file, unloads what it wants no more and begins the loads that are due."""
        if time.monotonic() >= self._next_look:
            await self._look()
            self._next_look = time.monotonic() + self._file.period
        if self._desired is None:
            return
        self._unload_unwanted(self._desired)
        # What failed before does not hold up what was never tried.
        for adapter in sorted(self._desired.adapters, key=self._has_failed):
            if self._registry.loads.busy:
                break
            if self._is_due(adapter):
                self._begin(adapter.name, self._load, self._attempts[adapter.name])
                # It takes its place among the loads before the next one looks for one.
                await asyncio.sleep(0)
        self.ready = self.ready or not any(map(self._is_awaited, self._desired.adapters))

    def statuses(self) -> Iterator[DesiredStatus]:
        """Every entry of the last good file, and every name that it could not take away."""
        if self._desired is None:
            return
        for adapter in self._desired.adapters:
            yield self._status(adapter)
        for entry in self._desired.bad:
            yield self._status_of_bad(entry)
        for failure in self._removal_errors.values():
            yield DesiredStatus(
                failure.name,
                DesiredState.FAILED,
                None,
                self._digest(failure.name),
                failure.kind,
                failure.message,
            )

    def _begin(
        self, name: str, work: Callable[[*Args], Coroutine[Any, Any, object]], *args: *Args
    ) -> None:
        """Unless something is done for the name already: the next look decides anew."""
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(work(*args))
            task.add_done_callback(lambda task: self._end(name, task))

    def _end(self, name: str, task: asyncio.Task[object]) -> None:
        del self._tasks[name]
        error = tasks.failure(task)
        if error is not None:
            logger.error("Adapters file: %s could not be unloaded", name, exc_info=error)
            self._registry.events.task_failed("adapters_file")

    # The file

    async def _look(self) -> None:
        try:
            content = await asyncio.to_thread(self._file.read)
            if content == self._content:
                # Known, be it to be bad.
                if self.error is None:
                    self.read_at = time.time()
                else:
                    self.read_failures += 1
                return
            self._content = content
            self._take(await asyncio.to_thread(parse, content))
        except RequestError as error:
            if isinstance(error, FetchError):
                self._content = None
            self.read_failures += 1
            failure = failure_of(LABEL, LABEL, error)
            if failure != self.error:
                logger.error("The adapters file is not followed: %s", error)
            self.error = failure

    def _take(self, desired: DesiredSet) -> None:
        for entry in desired.bad:
            logger.error("An entry of the adapters file does not hold: %s", entry.message)
        logger.info("Adapters file: %d adapters wanted", len(desired.adapters))
        self._desired, self.error, self.read_at = desired, None, time.time()
        self._attempts = {
            name: attempt
            for name, attempt in self._attempts.items()
            if desired.by_name.get(name) == attempt.adapter
        }

    # What it wants no more

    def _unload_unwanted(self, desired: DesiredSet) -> None:
        """Begins to unload it: a name may have to wait for a client's load of it."""
        unwanted = [g for g in self._registry if self._is_unwanted(g, desired)]
        names = {generation.name for generation in unwanted}
        self._removal_errors = {n: e for n, e in self._removal_errors.items() if n in names}
        for generation in unwanted:
            self._begin(generation.name, self._unload, generation)
        for name, failure in self._registry.failures.items():
            if failure.desired and not may_name(name, desired):
                self._begin(name, self._registry.dismiss, name)

    async def _unload(self, generation: Generation) -> None:
        name = generation.name
        try:
            await self._registry.unload(name, generation.digest)
        except OVERTAKEN:
            return
        except RequestError as error:
            self._removal_errors[name] = failure_of(name, LABEL, error)

    def _is_unwanted(self, generation: Generation, desired: DesiredSet) -> bool:
        source = generation.status.source
        if generation.name in desired.absent:
            return source.remembered
        return source.desired and not may_name(generation.name, desired)

    # What it wants

    def _has_failed(self, adapter: DesiredAdapter) -> bool:
        attempt = self._attempts.get(adapter.name)
        return attempt is not None and attempt.failure is not None

    def _is_due(self, adapter: DesiredAdapter) -> bool:
        attempt = self._attempts.setdefault(adapter.name, Attempt(adapter))
        if adapter.name in self._tasks or not attempt.backoff.is_due:
            return False
        withdrawn = self._registry.failures.get(adapter.name)
        if attempt.digest is not None and withdrawn is not None:
            # It was served, and turned out not to do when it was first asked for.
            attempt.digest = None
            attempt.fail(withdrawn, passing=False)
            return False
        return not self._is_served(attempt)

    def _is_served(self, attempt: Attempt) -> bool:
        """Whether its name serves what it says, pinned and limited as it says."""
        served = self._registry.get(attempt.adapter.name)
        pinned, limits = attempt.adapter.pinned, attempt.adapter.limits
        return (
            served is not None
            and self._has_weights(attempt)
            and (pinned is None or served.status.slot.pinned == pinned)
            and (limits is None or served.status.traffic.limits == limits)
        )

    def _has_weights(self, attempt: Attempt) -> bool:
        """Whether its name serves the weights that were loaded for it, or of the digest that it
        names."""
        served = self._registry.get(attempt.adapter.name)
        if served is None or not served.status.source.desired:
            return False
        return served.digest == (attempt.adapter.digest or attempt.digest)

    async def _load(self, attempt: Attempt) -> None:
        try:
            digest = attempt.adapter.digest or attempt.digest
            if digest is not None and self._has_weights(attempt):
                await self._pin_and_limit(attempt.adapter)
                attempt.succeed(digest)
            else:
                await self._load_weights(attempt)
        except OVERTAKEN:
            return
        except Exception as error:
            self._refused(attempt, error)

    async def _pin_and_limit(self, adapter: DesiredAdapter) -> None:
        if adapter.limits is not None:
            await self._registry.limit(adapter.name, adapter.limits)
        if adapter.pinned is not None:
            await self._registry.pin(adapter.name, adapter.pinned)

    async def _load_weights(self, attempt: Attempt) -> None:
        adapter = attempt.adapter
        served = self._registry.get(adapter.name)
        if served is not None and not served.status.source.remembered:
            raise BadNameError(
                f"{LABEL}: name: found {adapter.name!a}, which --adapter serves, expected another"
            )
        # What is new takes nobody's place in the workers before it is asked for; what takes the
        # place of other weights, or did not do the last time, has to prove itself first.
        options = LoadOptions(
            pinned=adapter.pinned,
            content=adapter.digest,
            allow_noop=adapter.allow_noop,
            eager=bool(adapter.pinned) or served is not None or attempt.failure is not None,
            when_not_invoked=adapter.when_not_invoked,
            limits=adapter.limits,
        )
        fetch = wanted_by_file(self._fetch(adapter), lambda: self._wants(adapter))
        loaded = await self._registry.load(adapter.name, adapter.location, fetch, options)
        attempt.succeed(loaded.generation.digest)

    def _fetch(self, adapter: DesiredAdapter) -> Fetch:
        if adapter.vllm_source:
            return self._sources.fetch_for_vllm(adapter.location)
        return self._sources.fetch(
            adapter.location,
            adapter.lora_b_layout,
            adapter.base_is_residual,
            adapter.non_granular_after,
        )

    def _wants(self, adapter: DesiredAdapter) -> bool:
        return self._desired is not None and self._desired.by_name.get(adapter.name) == adapter

    def _refused(self, attempt: Attempt, error: Exception) -> None:
        name = attempt.adapter.name
        failure = failure_of(name, attempt.adapter.location, error)
        if isinstance(error, NoLongerWantedError):
            return
        if not isinstance(error, RequestError | AdapterError):
            logger.exception("Adapters file: %s could not be loaded", name, exc_info=error)
        elif failure != attempt.failure:
            logger.error("Adapters file: %s is not served as it says: %s", name, error)
        known = isinstance(error, RequestError | AdapterError)
        attempt.fail(failure, passing=isinstance(error, PASSING) or not known)
        self._registry.names.fail(name, attempt.adapter.location, error, desired=True)

    # How it stands

    def _is_awaited(self, adapter: DesiredAdapter) -> bool:
        """Whether a server that has just started is not ready without it."""
        attempt = self._attempts.get(adapter.name)
        if attempt is None:
            return True
        if self._is_served(attempt):
            return False
        if attempt.failure is None:
            return True
        # What an earlier server served under its name goes on until it can be replaced.
        return attempt.passing and self._registry.get(adapter.name) is None

    def _status(self, adapter: DesiredAdapter) -> DesiredStatus:
        attempt = self._attempts.get(adapter.name)
        state, failure, retry = DesiredState.PENDING, None, None
        if attempt is not None and self._is_served(attempt):
            state = DesiredState.CONVERGED
        elif attempt is not None and attempt.failure is not None:
            state, failure = DesiredState.FAILED, attempt.failure
            retry = attempt.backoff.seconds_left
        return DesiredStatus(
            adapter.name,
            state,
            adapter.location,
            self._digest(adapter.name),
            None if failure is None else failure.kind,
            None if failure is None else failure.message,
            retry,
        )

    def _status_of_bad(self, entry: BadEntry) -> DesiredStatus:
        digest = None if entry.name is None else self._digest(entry.name)
        return DesiredStatus(
            entry.name, DesiredState.FAILED, None, digest, "invalid_adapters_file", entry.message
        )

    def _digest(self, name: str) -> str | None:
        served = self._registry.get(name)
        return None if served is None else served.digest


class NoLongerWantedError(RequestError):
    """The file has said otherwise while the load waited for its turn."""

    kind = "no_longer_wanted"


@contextmanager
def wanted_by_file(fetch: Fetch, is_wanted: Callable[[], bool]) -> Iterator[Source]:
    """What `fetch` brings, as the file's. Entered when the name's turn has come, for a load that
    waited may be of an older file by then."""
    if not is_wanted():
        raise NoLongerWantedError(f"{LABEL}: found another entry by now")
    with fetch as source:
        yield replace(source, desired=True)


def may_name(name: str, desired: DesiredSet) -> bool:
    """By any entry, be it a bad one: what it means to say of the name is not known, and one whose
    name cannot be read may be this one's."""
    return name in desired.named or None in desired.named
