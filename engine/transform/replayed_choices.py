"""A mixture's choices in the shape in which vLLM gives a base's: `[tokens, layers, k]`.

vLLM has one router a layer and one k (vllm/distributed/aux_output_connector). A mixture may have a
router at every linear: the routers of a layer lie side by side, each with as many columns as it
chooses experts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molehill.engine.adapter.model import layer_of
from molehill.engine.transform.routers import DecidingRouter

# Ids that a byte holds; vLLM takes the narrowest of its two types that holds all.
BYTE = 256


@dataclass(frozen=True)
class ReplayedRouter:
    """A router's ids are those of `layer` from `column` on, `chosen` of `experts`."""

    layer: int
    column: int
    chosen: int
    experts: int


@dataclass(frozen=True)
class ReplayedChoices:
    """layers: of the base. k: ids of the layer that has the most. routers: in the adapter's
    order."""

    layers: int
    k: int
    routers: tuple[ReplayedRouter, ...]

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        widest = max(router.experts for router in self.routers)
        return np.dtype(np.uint8) if widest <= BYTE else np.dtype(np.uint16)

    def array(self, experts: NDArray[np.int16]) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """`[tokens, layers, k]` of ids `[tokens, routers, most]`, -1 where nobody was chosen.

        In the place of -1 is the first id that the router did not choose: none is there twice, for
        who replays them by adding up. Columns that are no router's are 0, as vLLM's are of layers
        without experts.
        """
        result = np.zeros((len(experts), self.layers, self.k), self.dtype)
        for i, router in enumerate(self.routers):
            columns = slice(router.column, router.column + router.chosen)
            result[:, router.layer, columns] = filled(experts[:, i], router)
        return result


def filled(chosen: NDArray[np.int16], router: ReplayedRouter) -> NDArray[np.int16]:
    """One router's `[tokens, most]` with as many ids as it chooses, `[tokens, chosen]`."""
    ids = chosen[:, : router.chosen]
    lacking = (ids < 0).any(1)
    if not lacking.any():
        return ids
    # Those that were chosen in their order, then all others.
    places = np.full((int(lacking.sum()), router.experts + 1), router.chosen)
    known = np.where(ids[lacking] < 0, router.experts, ids[lacking])
    np.put_along_axis(places, known, np.arange(router.chosen)[None], axis=1)
    order = np.argsort(places[:, : router.experts], axis=1, kind="stable")
    ids = ids.copy()
    ids[lacking] = order[:, : router.chosen]
    return ids


def replayed_choices(routers: Sequence[DecidingRouter], layers: int) -> ReplayedChoices | str:
    """Of a mixture on a base of so many layers; why there are none, where there are none."""
    taken: Counter[int] = Counter()
    placed = []
    for router in routers:
        layer = layer_of(router.site)
        if layer is None or layer >= layers:
            return f"{router.site} is in none of the base's {layers} layers"
        if router.head is not None:
            return f"{router.site} decides head by head"
        if not router.is_fixed:
            return f"how many experts {router.site} chooses hangs on the token"
        placed.append(ReplayedRouter(layer, taken[layer], router.most, router.experts))
        taken[layer] += router.most
    if all(router.most == router.experts for router in routers):
        return "no router chooses some of its experts"
    return ReplayedChoices(layers, max(taken.values()), tuple(placed))
