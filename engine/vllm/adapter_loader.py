"""From an adapter's files to what a slot of this rank takes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from vllm.logger import init_logger

from molehill.engine import formats
from molehill.engine.adapter.errors import LimitError
from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.routing_stats import costs, token_costs
from molehill.engine.transform.merge import MergedBase, merge_static, subtract
from molehill.engine.vllm import prefix_keys
from molehill.engine.vllm.host_cache import AdapterKey, PreparedAdapter
from molehill.engine.vllm.model.patched_model import PatchedModel
from molehill.engine.vllm.prefetch import StepPacer
from molehill.engine.vllm.settings import Settings
from molehill.kernels.interface import Backend, CapacityError, SlotWeights
from molehill.kernels.mixture import FfnMixture, LinearMixture, Reflection

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
        model: PatchedModel,
        dtype: torch.dtype,
        pacer: StepPacer,
        free_bytes: Callable[[], int],
        is_alone: bool,
        merged_base: MergedBase | None,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._model = model
        self._dtype = dtype
        self._pacer = pacer
        self._free_bytes = free_bytes
        self._is_alone = is_alone
        self._merged_base = merged_base

    def load(self, key: AdapterKey, beside: bool) -> Adapter | PreparedAdapter:
        """An adapter that is ready for a slot, or one that `pack` makes ready in a pause.

        beside: it runs beside steps, and reads a copy of the store, which the API process has
        checked against the base. Raises AdapterError.

        Cutting has to wait for a pause where ranks do it together, and where it reads the base's
        weights through the layers that the step is using.
        """
        if beside:
            adapter = native.read_stored(Path(key.path), self._pacer.wait_for_step)
            self._pacer.wait_for_step()
        else:
            adapter = formats.read(Path(key.path), self._settings.limits, base=self._model.base)
            validate(adapter, self._model.base, self._settings.limits)
        prefix_keys.check(adapter)
        served = self._without_merged_base(self._merged(adapter))
        return served if _reads_base(served) or not self._is_alone else self.pack(served, beside)

    def pack(self, adapter: Adapter, beside: bool = False) -> PreparedAdapter:
        """This rank's share of an adapter that `load` or `base_rows` gave.

        Packed weights take memory: where there is none now, the backend packs them as it stores
        them, or refuses. Raises LimitError.
        """
        if adapter.by_token is not None:
            return self._pack_members(adapter, adapter.by_token, beside)
        cut = self._model.cut(adapter)
        if beside:
            self._pacer.wait_for_step()
        needed = cut.num_bytes(self._dtype)
        try:
            weights = self._backend.pack(cut) if needed <= self._free_bytes() else cut
        except CapacityError as error:
            raise LimitError(error.where, error.found, error.expected) from error
        # Neither sites of other pipeline stages, nor those on the base's own experts and on the
        # vocabulary: how many tokens go there is not counted.
        counted = costs(adapter, self._model.has_counted, self._model.base)
        return PreparedAdapter(
            counted,
            cut.moes,
            needed,
            cut.is_empty,
            weights,
            adapter.invocation_tokens,
            cut.vocabulary,
        )

    def _pack_members(
        self, adapter: Adapter, by_token: TokenAdapters, beside: bool
    ) -> PreparedAdapter:
        """What is counted is one site, at which the token's id is the router."""
        members = tuple(self.pack(member, beside) for member in by_token.adapters.values())
        return PreparedAdapter(
            token_costs([member.costs for member in members]),
            {},
            sum(member.num_bytes for member in members),
            False,
            SlotWeights({}, {}),
            adapter.invocation_tokens,
            # The weights are in the members.
            by_token=by_token.changed(lambda member: replace(member, sites={}, biases={})),
            members=members,
        )

    def base_rows(self) -> Adapter:
        """What rows without an adapter need where one is merged into the base weights."""
        return self._without_merged_base(Adapter("base", {}))

    def _merged(self, adapter: Adapter) -> Adapter:
        """The adapter with its static sites as one pair each."""
        if self._merged_base is not None and adapter.digest == self._merged_base.digest:
            # The very bits that are in the base weights.
            return self._merged_base.merged
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

    def _without_merged_base(self, adapter: Adapter) -> Adapter:
        return subtract(adapter, self._merged_base.pairs) if self._merged_base else adapter


def _reads_base(adapter: Adapter) -> bool:
    """Whether cutting it reads the base's weights: for DoRA's norms, a reflection's B, or biases in
    whose place trained ones stand."""
    if adapter.by_token is not None:
        return any(map(_reads_base, adapter.by_token.adapters.values()))
    if any(bias.trained is not None for bias in adapter.biases.values()):
        return True
    return any(
        isinstance(mixture, Reflection)
        or (isinstance(mixture, LinearMixture) and mixture.magnitude is not None)
        or (isinstance(mixture, FfnMixture) and bool(mixture.magnitudes))
        for mixture in adapter.sites.values()
    )
