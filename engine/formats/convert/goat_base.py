"""What GOAT took out of the base weights before it trained (arXiv 2502.16894).

W = U S V^T, and training saw W' = W - c / rho * (U S V^T of some singular values). The files hold
neither W' nor that part, so it is made anew of W: a pair that every token gets, less.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from molehill.engine.adapter.errors import NonFiniteError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import is_finite
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import goat
from molehill.kernels.mixture import Experts, LinearMixture, Mixture


def with_base(adapter: Adapter, config: Fields, weights: Mapping[str, Tensor]) -> Adapter:
    """adapter: as it is read for W'. config: its adapter_config.json. weights: W `[out, in]` of
    each of its sites. Raises ConfigError, NonFiniteError, ShapeError."""
    sites: dict[str, Mixture] = {}
    for site, mixture in adapter.sites.items():
        assert isinstance(mixture, LinearMixture)
        weight = weights[site]
        expected = [mixture.experts.b.shape[0], mixture.experts.a.shape[1]]
        if list(weight.shape) != expected:
            raise ShapeError(f"the base's {site}", list(weight.shape), expected)
        if not is_finite(weight):
            raise NonFiniteError(f"the base's {site}", "NaN or Inf", "finite values")
        places = goat.taken(config, mixture.num_experts, min(expected))
        sites[site] = replace(mixture, shared=_taken(weight, places, goat.share(config)))
    # What was said of the base as it was in training is no longer so.
    notes = tuple(
        text for text in adapter.warnings if not text.startswith(f"{goat.CHANGED_BY} is ")
    )
    return replace(adapter, sites=sites, warnings=notes)


def _taken(weight: Tensor, places: list[int], share: float) -> Experts:
    """-share times what the singular values at these places stand for.

    The SVD is in float32, as that of the authors' code.
    """
    u, sigma, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = sigma[places].sqrt()
    b = u[:, places] * root * -share
    return Experts((v[places] * root[:, None]).contiguous(), b.contiguous(), (len(places),))
