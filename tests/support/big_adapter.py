"""Adapters of megabytes for the tiny Llama, which has none of its own."""

from pathlib import Path

import torch

from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.hf.shapes import base_model
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Soft
from support.golden import TINY_LLAMA

RANK = 64


def save(path: Path, experts: int, below: tuple[str, ...] = ("layers.",)) -> int:
    """A soft mixture on every linear below these parts of the model, of random numbers; returns its
    bytes, 1.4 MB per expert where it is on all four layers."""
    ranks = (RANK,) * experts
    sites = {
        site: LinearMixture(
            Experts(torch.randn(sum(ranks), i) * 0.01, torch.randn(o, sum(ranks)) * 0.01, ranks),
            Soft(),
            torch.randn(experts, i),
        )
        for site, (i, o) in base_model(TINY_LLAMA).linears.items()
        if site.startswith(below)
    }
    adapter = Adapter("soft", sites)
    native.write(adapter, path)
    return adapter.num_bytes
