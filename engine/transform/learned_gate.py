"""A learned gate over LoRAs that were trained apart (MoLoRA, arXiv 2603.15965).

The paper's abstract says what is routed: single tokens, over independently trained LoRAs, by a
learned router. Its formula was not at hand; what is computed here is defined in docs/format.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.transform.weighted_sum import (
    Part,
    check_alike,
    check_no_table,
    common_base,
    low_rank,
    stack_up,
    warnings,
)
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Soft, TopK


@dataclass(frozen=True)
class SiteRouter:
    """weight: G `[E, in]` float32. where: the file and the tensor, for errors."""

    weight: Tensor
    where: str


def routed(
    parts: Sequence[Part],
    routers: Mapping[str, SiteRouter],
    policy: Soft | TopK,
    temperature: float,
) -> Adapter:
    """y = W x + sum_e w_e B_e A_e x, w = policy(softmax(G x / temperature)), at every linear that
    any part adapts; a part that does not adapt it adds nothing there.

    parts: the experts, in the order of the routers' rows, each times its scale. routers: by site,
    for every one. Raises UnsupportedError for a part that is no LoRA (named, with the reason),
    ShapeError where parts disagree or a router does not fit.
    """
    stacks: dict[str, dict[int, Experts]] = {}
    for e, part in enumerate(parts):
        check_no_table(part.name, part.adapter)
        for site in (*part.adapter.rows, *part.adapter.biases):
            found, expected = "rows or a bias beside a learned gate", "low-rank pairs alone"
            raise UnsupportedError(f"{part.name}: {site}", found, expected)
        for site, mixture in part.adapter.sites.items():
            pair = low_rank(part.name, site, mixture)
            expert = Experts(pair.a, pair.b * part.scale, (sum(pair.ranks),))
            stack = stacks.setdefault(site, {})
            if stack:
                check_alike(part.name, site, expert, next(iter(stack.values())))
            stack[e] = expert
    sites = {}
    for site, stack in stacks.items():
        experts = stack_up(_expert(stack, e) for e in range(len(parts)))
        check_router(site, routers[site], [len(parts), experts.a.shape[1]])
        sites[site] = LinearMixture(experts, policy, routers[site].weight / temperature)
    adapters = [part.adapter for part in parts]
    return Adapter("molora", sites, common_base(adapters), warnings(parts))


def check_router(site: str, router: SiteRouter, shape: list[int]) -> None:
    """Raises ShapeError."""
    actual = list(router.weight.shape)
    if actual != shape:
        expected = f"{shape}, of the adapters and of what {site} reads"
        raise ShapeError(router.where, actual, expected)


def _expert(stack: Mapping[int, Experts], e: int) -> Experts:
    """A pair of zeros for an adapter that leaves the linear as it is."""
    if e in stack:
        return stack[e]
    like = next(iter(stack.values()))
    return Experts(torch.zeros(1, like.a.shape[1]), torch.zeros(like.b.shape[0], 1), (1,))
