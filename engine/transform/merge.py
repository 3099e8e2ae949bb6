"""Merging: what is static becomes one low-rank pair, and low-rank pairs become part of W.

`collapse` and `merge_static` are exact up to float32's rounding, unless a tolerance is asked for.
`subtract` is the other direction: what an adapter must do on a base into which another is merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.model import Adapter, TokenAdapters, natural_key
from molehill.engine.adapter.vocabulary_sites import is_on_vocabulary
from molehill.engine.transform.rank import surely_full
from molehill.engine.transform.static_gates import gate
from molehill.kernels.mixture import (
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
)
from molehill.kernels.policy import Constant

# Singular values below this part of the largest are gone in float32's rounding of the product.
NUMERICAL_RANK = torch.finfo(torch.float32).eps

PLAIN = Constant((1.0,))


@dataclass(frozen=True)
class SiteMerge:
    """One site that merged. rank_before: of all experts together; rank_after: of the one pair.

    An FFN's figures are its projections' sums. error: `static_gates.deviation`, 0 if it is
    exact.
    """

    site: str
    reason: str
    rank_before: int
    rank_after: int
    error: float


def collapse(experts: Experts, weights: Tensor) -> Experts:
    """sum_e w_e B_e A_e as one pair of its numerical rank, never a higher one than before.

    weights: `[E]`. A pair of full numerical rank keeps its own A, and B times w; with w = 1 that is
    the very pair.
    """
    factor = weights.double()[experts.expert_of_row]
    kept = factor != 0
    a, b = experts.a, experts.b
    if not bool(kept.all()):
        a, b, factor = a[kept], b[:, kept], factor[kept]
    if bool((factor != 1).any()):
        b = b.double() * factor
    if surely_full(a, b, NUMERICAL_RANK):
        return _pair(a, b.float())
    if not (bool(a.any()) and bool(b.any())):
        return _pair(a.new_zeros(1, a.shape[1]), a.new_zeros(b.shape[0], 1))
    return _recompressed(a, b)


def _recompressed(a: Tensor, b: Tensor) -> Experts:
    """B A as a pair of its numerical rank.

    With A^T = Q_a R_a and B = Q_b R_b, both in float64, the product's singular values are those of
    R_b R_a^T, `[R, R]` (recompression as for hierarchical matrices; Hackbusch,
    ISBN 978-3-662-47324-5, 2.6).
    """
    tall_a, tall_b = a.double().T, b.double()
    r_a, r_b = (torch.linalg.qr(tall, mode="r").R for tall in (tall_a, tall_b))
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = max(1, int((sigma > NUMERICAL_RANK * sigma[0]).sum()))
    if rank == len(a):
        return _pair(a, b.float())
    q_a, q_b = (torch.linalg.qr(tall).Q for tall in (tall_a, tall_b))
    root = sigma[:rank].sqrt()
    return _pair((root[:, None] * (v[:rank] @ q_a.T)).float(), ((q_b @ u[:, :rank]) * root).float())


def _pair(a: Tensor, b: Tensor) -> Experts:
    return Experts(a.contiguous(), b.contiguous(), (a.shape[0],))


def merge_static(
    adapter: Adapter, base: BaseModel | None = None, tolerance: float = 0.0
) -> tuple[Adapter, tuple[SiteMerge, ...]]:
    """The adapter with every static site as plain low-rank pairs, and what was merged.

    A static FFN mixture becomes linears. Sites with a magnitude (DoRA) stay as they are. The same
    adapter comes back if nothing merges, so merging twice is merging once.
    base: what FFN mixtures that name an activation are held against; unknown, those stay.
    tolerance: see `static_gates.gate`; above 0 the result is an approximation.
    """
    if adapter.by_token is not None:
        return _merge_members(adapter, adapter.by_token, base, tolerance)
    sites: dict[str, Mixture] = {}
    merges: list[SiteMerge] = []
    for site in sorted(adapter.sites, key=natural_key):
        mixture = adapter.sites[site]
        activation = base.ffns.get(site) if base else None
        merged = merge_site(site, mixture, activation, tolerance)
        sites.update({site: mixture} if merged is None else merged[0])
        if merged is not None:
            merges.append(merged[1])
    return (replace(adapter, sites=sites) if merges else adapter), tuple(merges)


def _merge_members(
    adapter: Adapter, by_token: TokenAdapters, base: BaseModel | None, tolerance: float
) -> tuple[Adapter, tuple[SiteMerge, ...]]:
    """Each adapter by token by itself; its sites go by its name."""
    merged = {n: merge_static(m, base, tolerance) for n, m in by_token.adapters.items()}
    merges = tuple(
        replace(merge, site=f"{name}: {merge.site}")
        for name, (_, of_member) in merged.items()
        for merge in of_member
    )
    if not merges:
        return adapter, ()
    adapters = {name: member for name, (member, _) in merged.items()}
    return replace(adapter, by_token=replace(by_token, adapters=adapters)), merges


def merge_site(
    site: str, mixture: Mixture, activation: str | None = None, tolerance: float = 0.0
) -> tuple[dict[str, LinearMixture], SiteMerge] | None:
    """One static site as linears; None if it is dynamic, merged already, of vectors, or one whose
    pair takes the base's weight.

    activation: the base's, of an FFN.
    """
    if isinstance(mixture, ScaleMixture | Reflection | ClassifierMixture):
        return None
    if isinstance(mixture, LinearMixture) and mixture.magnitude is not None:
        return None
    fixed = gate(mixture, activation, tolerance)
    if fixed.weights is None:
        return None
    if isinstance(mixture, FfnMixture):
        stacks = {f"{site}.{name}": experts for name, experts in sorted(mixture.experts.items())}
    else:
        stacks = {site: mixture.experts}
    weights = fixed.weights
    if isinstance(mixture, LinearMixture) and mixture.shared is not None:
        ranks = (*mixture.experts.ranks, *mixture.shared.ranks)
        stacks = {site: replace(_joined(mixture.experts, mixture.shared), ranks=ranks)}
        weights = torch.cat([weights, torch.ones(1)])
    merged = {
        name: LinearMixture(collapse(experts, weights), PLAIN) for name, experts in stacks.items()
    }
    before = sum(sum(experts.ranks) for experts in stacks.values())
    after = sum(sum(linear.experts.ranks) for linear in merged.values())
    if before == after and is_plain(mixture):
        return None
    return merged, SiteMerge(site, fixed.reason, before, after, fixed.error)


def is_plain(mixture: Mixture) -> bool:
    """Whether a site is nothing but y = W x + B A x."""
    return (
        isinstance(mixture, LinearMixture)
        and mixture.policy == PLAIN
        and mixture.router is None
        and mixture.magnitude is None
        and mixture.shared is None
    )


def why_not_plain(mixture: Mixture) -> str:
    """What keeps a site from being one low-rank pair."""
    if getattr(mixture, "magnitude", None) is not None:
        return "a magnitude (DoRA)"
    if isinstance(mixture, Reflection):
        return "a reflection of what W reads (HRA)"
    if isinstance(mixture, ScaleMixture) and mixture.num_experts == 1:
        return "a vector that scales ((IA)^3)"
    return f"a dynamic site ({gate(mixture).reason})"


def plain_sites(adapter: Adapter) -> dict[str, Experts]:
    """The pairs B A of the sites that are nothing else."""
    return {
        site: mixture.experts
        for site, mixture in adapter.sites.items()
        if isinstance(mixture, LinearMixture) and is_plain(mixture)
    }


def mergeable_sites(adapter: Adapter) -> dict[str, Experts]:
    """After `merge_static`, all that can go into base weights and come out again as a low-rank
    pair. On the vocabulary nothing is: one weight may be the embedding's and the head's."""
    pairs = plain_sites(adapter)
    return {site: pair for site, pair in pairs.items() if not is_on_vocabulary(site)}


@dataclass(frozen=True)
class MergedBase:
    """The adapter whose plain pairs are in the base's weights.

    digest: of the adapter as it was loaded, or "" for one that came as `merged` is.
    """

    merged: Adapter
    digest: str = ""

    @cached_property
    def pairs(self) -> dict[str, Experts]:
        """The merged pairs by site."""
        return mergeable_sites(self.merged)


def check_mergeable(adapter: Adapter, where: str) -> None:
    """Raises UnsupportedError for one that may not become part of the base's weights."""
    if adapter.invocation_tokens:
        found = "an activated adapter (alora_invocation_tokens), which acts on a part of the tokens"
        raise UnsupportedError(where, found, "one that acts on every token")
    check_one(adapter, where)


def check_one(adapter: Adapter, where: str) -> None:
    """Raises UnsupportedError for one that is others by token ids: no weight is all of them."""
    if adapter.by_token is not None:
        found = "adapters that tokens have by their ids (token_adapters)"
        raise UnsupportedError(where, found, "one that is the same for every token")
    if adapter.classifier is not None:
        found = "a classifier that gives each token its gate weights (X-LoRA)"
        raise UnsupportedError(where, found, "one that is the same for every token")


def merged_weight(weight: Tensor, mixture: LinearMixture) -> Tensor:
    """W + B A, with a magnitude m / ||W + B A|| * (W + B A) by rows: `[out, in]`.

    Computed in float32 and rounded once, to the dtype of `weight`. The site must be plain or DoRA.
    """
    adapted = weight.float() + mixture.experts.b @ mixture.experts.a
    if mixture.magnitude is not None:
        adapted = adapted * (mixture.magnitude / adapted.norm(dim=1))[:, None]
    return adapted.to(weight.dtype)


def subtract(adapter: Adapter, merged_pairs: Mapping[str, Experts]) -> Adapter:
    """What does on W + B A what `adapter` does on W; merged_pairs: those in the weights, by site.

    A site whose pair is the merged one's bits is left out: the weights do that already. Raises
    UnsupportedError for what a low-rank pair beside it cannot set right: X-LoRA, vectors,
    reflections of what W reads, and magnitudes of experts inside an FFN, whose norms are of W.
    """
    if adapter.by_token is not None:
        members = adapter.by_token.changed(partial(subtract, merged_pairs=merged_pairs))
        return replace(adapter, by_token=members)
    if adapter.classifier is not None:
        _refuse("classifier", "X-LoRA, whose classifier reads what the base itself makes")
    sites: dict[str, Mixture] = dict(adapter.sites)
    for site, mixture in sites.items():
        if isinstance(mixture, ScaleMixture) and site in merged_pairs:
            _refuse(site, "vectors")
        if isinstance(mixture, Reflection) and site in merged_pairs:
            _refuse(site, "a reflection of what W reads")
        if isinstance(mixture, FfnMixture):
            for name in mixture.magnitudes:
                if f"{site}.{name}" in merged_pairs:
                    _refuse(f"{site}.{name}", "magnitudes of experts")
    for site, merged in merged_pairs.items():
        negated = Experts(merged.a, -merged.b, merged.ranks)
        present = sites.get(site)
        if present is None:
            sites[site] = LinearMixture(negated, PLAIN)
        elif isinstance(present, LinearMixture):
            if is_plain(present) and _equal(present.experts, merged):
                del sites[site]
            else:
                sites[site] = _beside(present, negated)
    return replace(adapter, sites=sites)


def _refuse(site: str, found: str) -> None:
    expected = "none where an adapter is merged into the base weights"
    raise UnsupportedError(site, found, expected)


def _equal(one: Experts, other: Experts) -> bool:
    return torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def _joined(one: Experts, other: Experts) -> Experts:
    """B A of both, as one pair."""
    return _pair(torch.cat([one.a, other.a]), torch.cat([one.b, other.b], dim=1))


def _beside(mixture: LinearMixture, pair: Experts) -> LinearMixture:
    """`mixture` and a pair that every token gets. Beside a magnitude it joins the one expert, for
    the magnitude scales the original W."""
    if mixture.router is not None:
        shared = pair if mixture.shared is None else _joined(mixture.shared, pair)
        return replace(mixture, shared=shared)
    joined = _joined(mixture.experts, pair)
    if mixture.magnitude is not None:
        return replace(mixture, experts=joined)
    weights = gate(mixture).weights
    assert weights is not None
    experts = replace(joined, ranks=(*mixture.experts.ranks, *pair.ranks))
    return LinearMixture(experts, Constant((*weights.tolist(), 1.0)))
