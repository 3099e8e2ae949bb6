"""From an adapter's files to what a slot of this rank takes."""

from collections.abc import Callable
from pathlib import Path

import torch
from vllm.logger import init_logger

from molehill.engine import formats
from molehill.engine.adapter.errors import LimitError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.routing_stats import costs
from molehill.engine.transform.merge import Resident, merge_static, subtract
from molehill.engine.vllm.host_cache import Prepared, Wanted
from molehill.engine.vllm.model.patched_model import Seams
from molehill.engine.vllm.prefetch import Pulse
from molehill.engine.vllm.settings import Settings
from molehill.kernels.interface import Backend, CapacityError

logger = init_logger("vllm.molehill")


class AdapterLoader:
    """Reads, checks, merges, cuts and packs. It keeps nothing: it may run beside a step, and beside
    itself.

    dtype: that the model is served in. free_bytes: of the memory for adapters, now.
    is_alone: whether this is the only tensor-parallel rank.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        model: Seams,
        dtype: torch.dtype,
        pulse: Pulse,
        free_bytes: Callable[[], int],
        is_alone: bool,
        resident: Resident | None,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._model = model
        self._dtype = dtype
        self._pulse = pulse
        self._free_bytes = free_bytes
        self._is_alone = is_alone
        self._resident = resident

    def load(self, wanted: Wanted, beside: bool) -> Adapter | Prepared:
        """An adapter that is ready for a slot, or one that `pack` makes ready in a pause.

        beside: it runs beside steps, and reads a copy of the store, which the API process has
        checked against the base. Raises AdapterError.

        Cutting has to wait for a pause where ranks do it together, and where it reads the base's
        weights through the layers that the step is using.
        """
        if beside:
            adapter = native.read_own(Path(wanted.path), self._pulse.wait)
            self._pulse.wait()
        else:
            adapter = formats.read(Path(wanted.path), self._settings.limits)
            validate(adapter, self._model.base, self._settings.limits)
        served = self._on_resident(self._merged(adapter))
        needs_base = any("magnitude" in name for name, _ in served.tensors())
        return served if needs_base or not self._is_alone else self.pack(served, beside)

    def pack(self, adapter: Adapter, beside: bool = False) -> Prepared:
        """This rank's share of an adapter that `load` or `base_rows` gave.

        Packed weights take memory: where there is none now, the backend packs them as it stores
        them, or refuses. Raises LimitError.
        """
        cut = self._model.cut(adapter)
        if beside:
            self._pulse.wait()
        needed = cut.num_bytes(self._dtype)
        try:
            weights = self._backend.pack(cut) if needed <= self._free_bytes() else cut
        except CapacityError as error:
            raise LimitError(error.where, error.found, error.expected) from error
        # Neither sites of other pipeline stages, nor those on the base's own experts: how many
        # tokens its router sends there is not counted.
        counted = costs(adapter, self._model.has_counted)
        return Prepared(counted, cut.moes, needed, cut.is_empty, weights)

    def base_rows(self) -> Adapter:
        """What rows without an adapter need where one is merged into the base weights."""
        return self._on_resident(Adapter("base", {}))

    def _merged(self, adapter: Adapter) -> Adapter:
        """The adapter with its static sites as one pair each."""
        if self._resident is not None and adapter.digest == self._resident.digest:
            # The very bits that are in the base weights.
            return self._resident.merged
        if not self._settings.merge:
            return adapter
        merged, sites = merge_static(adapter, self._model.base, self._settings.merge_tolerance)
        for site in sites:
            if site.error:
                text = "molehill: %s: experts merged with relative error %.3g"
                logger.info(text, site.site, site.error)
        if sites:
            before, after = sum(s.rank_before for s in sites), sum(s.rank_after for s in sites)
            text = "molehill: %d static sites merged, %d rank rows to %d"
            logger.info(text, len(sites), before, after)
        return merged

    def _on_resident(self, adapter: Adapter) -> Adapter:
        return subtract(adapter, self._resident.pairs) if self._resident else adapter
