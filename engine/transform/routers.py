"""The routers of an adapter whose choice depends on the token."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.transform.static_gates import gate
from molehill.kernels.mixture import ScaleMixture


@dataclass(frozen=True)
class DecidingRouter:
    """head: of a router that decides head by head, else None. most: of `experts` that one decision
    has. is_fixed: whether every decision has as many."""

    site: str
    head: int | None
    experts: int
    most: int
    is_fixed: bool = False


def routers(adapter: Adapter) -> tuple[DecidingRouter, ...]:
    """In natural order of their sites. Without those whose gate is the same for every token: no
    router decides there once the adapter is served."""
    return tuple(_routers(adapter))


def _routers(adapter: Adapter) -> Iterator[DecidingRouter]:
    for site in sorted(adapter.sites, key=natural_key):
        mixture = adapter.sites[site]
        if mixture.router is None or gate(mixture).weights is not None:
            continue
        experts = mixture.num_experts
        most = mixture.policy.most_experts(experts)
        heads: Iterable[int | None] = (None,)
        if isinstance(mixture, ScaleMixture) and mixture.of == "output":
            heads = range(mixture.num_heads)
        is_fixed = mixture.policy.fewest_experts(experts) == most
        yield from (DecidingRouter(site, head, experts, most, is_fixed) for head in heads)
