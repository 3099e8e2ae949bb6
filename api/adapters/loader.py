"""One load, from its source to the name that serves it."""

import logging

from molehill.api.adapters.errors import AlreadyLoadedError
from molehill.api.adapters.generation import Content, Generation, Loaded, Loading
from molehill.api.adapters.generations import Generations
from molehill.api.adapters.ingest import Fetch, Intake
from molehill.api.adapters.installer import Installer
from molehill.api.adapters.invocation import check_activated
from molehill.api.adapters.load_options import LoadOptions, check_expected
from molehill.api.adapters.merged_base import MergedBaseAdapter
from molehill.api.adapters.name_table import NameTable
from molehill.api.adapters.pins import Pins
from molehill.api.adapters.source import Source

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")


class Loader:
    """merged_base: the adapter whose weights may not change."""

    def __init__(
        self,
        names: NameTable,
        generations: Generations,
        intake: Intake,
        installer: Installer,
        pins: Pins,
        merged_base: MergedBaseAdapter | None,
    ) -> None:
        self._names = names
        self._generations = generations
        self._intake = intake
        self._installer = installer
        self._pins = pins
        self._merged_base = merged_base

    async def load(self, loading: Loading, fetch: Fetch, options: LoadOptions) -> Loaded:
        """See AdapterRegistry.load. Loads of one name run one after the other."""
        name = loading.name
        async with self._names.lock(name):
            old = self._names.get(name)
            check_expected(name, old, options.expected)
            content, source = await self._intake.take_in(loading, fetch, options)
            try:
                kept = self._kept(name, old, content, options)
            except Exception:
                await self._intake.release(content)
                raise
            if kept is not None:
                await self._intake.release(content)
                return await self._load_again(kept, source, options)
            new = await self._installer.install(loading, content, source, old, options)
            await self._switch(old, new, options)
            return Loaded(new, "loaded" if old is None else "replaced")

    def _kept(
        self, name: str, old: Generation | None, content: Content, options: LoadOptions
    ) -> Generation | None:
        """`old`, if it has these very bytes and is talked to in the same way.

        Raises NotActivatedError for options that do not fit them, MergedIntoBaseError,
        AlreadyLoadedError where others may not take its place."""
        check_activated(name, content.invocation_tokens, options.when_not_invoked)
        if self._merged_base is not None:
            self._merged_base.check_load(name, content.digest)
        if old is None:
            return None
        same = old.digest == content.digest
        if same and old.content.chat == content.chat:
            return old
        if not options.replace:
            other, them = ("another chat template", "it") if same else ("other weights", "them")
            raise AlreadyLoadedError(
                f"The lora adapter '{name}' has already been loaded with {other}. If you "
                f"want to replace {them}, set 'load_inplace' to True."
            )
        return None

    async def _load_again(self, old: Generation, source: Source, options: LoadOptions) -> Loaded:
        """The same bytes change nothing but what is known of them."""
        old.status.set_source(source)
        if options.allow_noop:
            old.status.check_with(None)
        if options.when_not_invoked is not None:
            old.status.answer_not_invoked(options.when_not_invoked)
        if options.pinned is not None:
            await self._pins.set(old, options.pinned)
        traffic = old.status.traffic
        limits = traffic.limits if options.limits is None else options.limits
        changed = limits != traffic.limits
        traffic.limit(limits)
        await self._names.changed()
        return Loaded(old, "limits_changed" if changed else "unchanged")

    async def _switch(self, old: Generation | None, new: Generation, options: LoadOptions) -> None:
        if old is not None:
            new.status.succeed(old.status)
        if options.limits is not None:
            new.status.traffic.limit(options.limits)
        self._names.serve(new)
        logger.info("Loaded adapter %s: %s, %s", new.name, new.content.kind, new.digest)
        await self._names.changed()
        if old is not None:
            await self._generations.retire(old)
