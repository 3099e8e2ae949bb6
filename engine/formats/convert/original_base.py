"""An adapter that was trained beside changed base weights, for the base as it was before.

Training began with a pair (A0, B0), scaled as the adapter's own, and took it out of the weights:
W' = W - B0 A0. So W' + B A = W + (B A - B0 A0), one pair of twice the rank. PiSSA and OLoRA made
the pair from W itself, others from what is gone by now; then the adapter as it was before training
has it, which PEFT calls `path_initial_model_for_weight_conversion`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from molehill.engine.adapter.errors import (
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import peft
from molehill.engine.transform.weighted_sum import check_alike, stack_up
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant

_INITIALISATION = "init_lora_weights"


def from_base(adapter: Adapter, config: Fields, weights: Mapping[str, Tensor]) -> Adapter:
    """adapter: as `changed_base.FIELD` has it read. config: its adapter_config.json. weights: W
    `[out, in]` of each of its sites, in the dtype of their file.

    Raises UnsupportedError for an initialisation that W does not determine, ConfigError,
    ShapeError.
    """
    initialisation = str(config.values.get(_INITIALISATION)).lower()
    if initialisation not in ("pissa", "olora"):
        raise UnsupportedError(
            f"{config.where}: {_INITIALISATION}",
            f"{initialisation}, whose initial values the base weights do not determine",
            "pissa or olora; --initial DIR takes any, DIR the adapter as it was before training",
        )
    factors = peft.scaling_factors(config, adapter.sites)
    pairs, rounded = {}, set()
    for site, weight in weights.items():
        experts = _experts(adapter, site)
        shape = [experts.b.shape[0], experts.a.shape[1]]
        if list(weight.shape) != shape:
            raise ShapeError(f"the base's {site}", list(weight.shape), shape)
        if weight.dtype != torch.float32:
            rounded.add(str(weight.dtype).removeprefix("torch."))
        rank = experts.ranks[0]
        if initialisation == "pissa":
            pairs[site] = principal_pair(weight.float(), rank)
        else:
            pairs[site] = orthonormal_pair(weight.float(), rank, factors[site])
    return _without(adapter, pairs, rounded)


def from_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """initial: the adapter as it was before training. Raises MissingTensorError, UnsupportedError,
    ShapeError."""
    pairs = {}
    for site in adapter.sites:
        if site not in initial.sites:
            expected = "one, as the trained adapter has"
            raise MissingTensorError(f"the initial adapter's {site}", "no tensors", expected)
        trained, initial_pair = _experts(adapter, site), _experts(initial, site)
        check_alike("the initial adapter", site, initial_pair, trained)
        pairs[site] = initial_pair
    return _without(adapter, pairs, set())


def principal_pair(weight: Tensor, rank: int) -> Experts:
    """PiSSA's (arXiv 2404.02948): the greatest singular values of W `[out, in]`, in float32 as PEFT
    has them. Its product does not depend on the adapter's scaling."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return Experts(root[:, None] * vh[:rank], u[:, :rank] * root, (rank,))


def orthonormal_pair(weight: Tensor, rank: int, factor: float) -> Experts:
    """OLoRA's (arXiv 2406.01775): the first columns of Q and rows of R of W = Q R, times the
    adapter's scaling."""
    q, r = torch.linalg.qr(weight)
    return Experts(r[:rank], q[:, :rank] * factor, (rank,))


def _experts(adapter: Adapter, site: str) -> Experts:
    mixture = adapter.sites[site]
    if not isinstance(mixture, LinearMixture) or len(mixture.experts.ranks) != 1:
        raise UnsupportedError(site, "a mixture", "one low-rank pair, as LoRA has")
    return mixture.experts


def _without(adapter: Adapter, pairs: Mapping[str, Experts], rounded: set[str]) -> Adapter:
    sites = dict(adapter.sites)
    for site, initial_pair in pairs.items():
        both = stack_up(
            [_experts(adapter, site), Experts(initial_pair.a, -initial_pair.b, initial_pair.ranks)]
        )
        one = Experts(both.a.contiguous(), both.b.contiguous(), (sum(both.ranks),))
        mixture = sites[site]
        assert isinstance(mixture, LinearMixture)
        sites[site] = replace(mixture, experts=one, policy=Constant((1.0,)))
    notes = tuple(text for text in adapter.warnings if not text.startswith(_INITIALISATION))
    if rounded:
        names = " and ".join(sorted(rounded))
        notes += (
            f"the base's file is in {names}, to which training may have rounded what was left of "
            "it: that rounding is not in the difference",
        )
    return replace(adapter, sites=sites, warnings=notes)
