"""Makes generations of what was taken in, and tries them out: what cannot run, or changes nothing,
is not served."""

from collections.abc import Awaitable, Callable
from functools import partial

from molehill.api.adapters.errors import EngineRefusedError, RequestError
from molehill.api.adapters.generation import Content, Generation, Loading
from molehill.api.adapters.generations import Generations
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.pins import Pins, relabelled
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.source import Source
from molehill.api.adapters.traffic_limits import NO_LIMITS

Probe = Callable[[Generation], Awaitable[None]]
Paused = Callable[[], Awaitable[bool]]


class Installer:
    """probe: raises RequestError for a generation that must not be served, EngineRefusedError where
    that could not be found out, or None. withdraw: called with what the probe refuses later.
    paused: whether the engine computes nothing until somebody resumes it, as a trainer does once
    its adapter is loaded; a probe would wait for that.
    """

    def __init__(
        self,
        residency: Residency,
        generations: Generations,
        pins: Pins,
        probe: Probe | None,
        withdraw: Callable[[Generation, RequestError], None],
        paused: Paused,
    ) -> None:
        self._residency = residency
        self._generations = generations
        self._pins = pins
        self._probe = probe
        self._withdraw = withdraw
        self._paused = paused

    async def install(
        self,
        loading: Loading,
        content: Content,
        source: Source,
        old: Generation | None,
        options: LoadOptions,
    ) -> Generation:
        """What its name is to serve next, in place of `old`; it is freed if that fails.

        Raises EngineRefusedError, CannotPinError and what the probe raises.
        """
        generation = self._generations.create(loading.name, content, source)
        # Its tenant's slots are counted from the try-out on.
        limits = NO_LIMITS if old is None else old.status.traffic.limits
        generation.status.traffic.limit(limits if options.limits is None else options.limits)
        if content.invocation_tokens:
            before = None if old is None else old.status.when_not_invoked
            generation.status.answer_not_invoked(options.when_not_invoked or before or "refuse")
        lease = self._generations.lease(generation)
        pinned = (
            old is not None and old.status.slot.pinned if options.pinned is None else options.pinned
        )
        unprobed = self._probe is not None and not options.allow_noop
        try:
            if options.eager or pinned or not self._residency.full:
                unprobed = not await self._try_out(loading, lease, unprobed) and unprobed
                self._pins.hand_over(old, generation, pinned)
            if unprobed:
                generation.status.check_with(partial(self._probe_late, generation))
        except Exception as error:
            lease.release()
            await self._generations.retire(generation)
            if isinstance(error, EngineRefusedError):
                raise relabelled(error, generation, source.label) from error
            raise
        lease.release()
        return generation

    async def _try_out(self, loading: Loading, lease: Lease, probes: bool) -> bool:
        """Brings it into the workers once; whether it was probed there."""
        loading.stage = "installing"
        await lease.acquire_slot()
        try:
            if not probes or self._probe is None or await self._paused():
                return False
            loading.stage = "probing"
            await self._probe(lease.generation)
            return True
        finally:
            lease.release_slot()

    async def _probe_late(self, generation: Generation) -> None:
        """The probe of what could not be probed when it was loaded."""
        assert self._probe is not None
        try:
            await self._probe(generation)
        except EngineRefusedError:
            # It is probed when it comes in again.
            raise
        except Exception as error:
            if isinstance(error, RequestError):
                self._withdraw(generation, error)
            raise EngineRefusedError(str(error)) from error
