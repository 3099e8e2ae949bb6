"""What stands before the kernels of every backend: its layers, and the check of what comes in."""

from abc import ABC, abstractmethod
from dataclasses import replace

from molehill.kernels.capture import routed_sites
from molehill.kernels.checks import Layers, check_ffn_shape, check_weights
from molehill.kernels.interface import (
    FfnShape,
    KernelCompilations,
    LinearShape,
    Packed,
    SlotWeights,
)
from molehill.kernels.routed_site import RoutedSite


class CheckedBackend(ABC):
    """The part of molehill.kernels.interface.Backend through which layers and weights come in.

    A backend brings the methods with an underscore, which see nothing unchecked.
    """

    most_slots_per_step: int | None = None

    def __init__(self) -> None:
        self._layers = Layers()
        # By slot and name.
        self._routed: dict[int, dict[str, RoutedSite]] = {}

    def register_linear(self, shape: LinearShape) -> int:
        """Backend.register_linear. Raises ValueError for what the backend does not run."""
        handle = self._add_linear(shape)
        self._layers.linears[handle] = shape
        return handle

    def register_ffn(self, shape: FfnShape) -> int:
        """Backend.register_ffn. Raises WeightsError if its linears do not fit it."""
        check_ffn_shape(shape, self._layers)
        handle = self._add_ffn(shape)
        self._layers.ffns[handle] = shape
        return handle

    def pack(self, weights: SlotWeights) -> Packed:
        """Backend.pack. Raises WeightsError as well."""
        check_weights(weights, self._layers)
        return replace(self._pack(weights), sites=routed_sites(weights))

    def store(self, slot: int, weights: SlotWeights | Packed) -> None:
        """Backend.store. Raises WeightsError as well, and ValueError for a slot that is taken."""
        packed = weights if isinstance(weights, Packed) else self.pack(weights)
        self._put(slot, packed)
        self._routed[slot] = {site.name: site for site in packed.sites}

    def routed_sites(self, slot: int) -> tuple[RoutedSite, ...]:
        """Backend.routed_sites; none of an empty slot."""
        return tuple(self._routed.get(slot, {}).values())

    @property
    def _captured_columns(self) -> int:
        """Of a captured row of any slot."""
        sites = (site for routed in self._routed.values() for site in routed.values())
        return max((site.stop for site in sites), default=0)

    def watch_compilations(self) -> KernelCompilations | None:
        """Backend.watch_compilations, of a backend whose kernels are compiled before it is made."""
        return None

    @abstractmethod
    def _add_linear(self, shape: LinearShape) -> int:
        """The handle of a new linear."""

    @abstractmethod
    def _add_ffn(self, shape: FfnShape) -> int:
        """The handle of a new FFN, whose linears fit it."""

    @abstractmethod
    def _pack(self, weights: SlotWeights) -> Packed:
        """Weights that fit their layers."""

    @abstractmethod
    def _put(self, slot: int, packed: Packed) -> None:
        """What `pack` returned, into a slot; on error the slot stays empty."""
