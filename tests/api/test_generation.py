"""What is known of an adapter once its files were read."""

from pathlib import Path

import torch
from operators import Operators

from molehill.api.adapters.generation import content_of
from molehill.engine.adapter.model import Adapter
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant, Soft

ROUTER = torch.randn(2, 64)


def linear(policy: Constant | Soft, router: torch.Tensor | None = None) -> LinearMixture:
    return LinearMixture(Experts(torch.randn(4, 64), torch.randn(48, 4), (2, 2)), policy, router)


def test_static_sites_are_counted_and_nothing_is_merged() -> None:
    """Workers merge; a factorisation of every site here would be the longest part of a load."""
    sites = {
        "layers.0.self_attn.q_proj": linear(Constant((0.3, 0.7))),
        "layers.0.self_attn.k_proj": linear(Soft(), torch.zeros(2, 64)),
        "layers.0.self_attn.v_proj": linear(Soft(), ROUTER),
    }
    with Operators() as operators:
        content = content_of(Adapter("mola", sites), Path("there"))
    assert content.plan == {"sites": 3, "static": 2, "dynamic": 1}
    assert [name for name in operators.names if "linalg" in name] == []
