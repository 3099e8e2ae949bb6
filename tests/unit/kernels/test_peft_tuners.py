"""PEFT's tuners as the reader reads them, at one linear of every backend, against PEFT's module."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import triton_cases, tuners
from support.backend_cases import assert_near, random
from support.golden import TINY_LLAMA

from molehill.engine import formats
from molehill.engine.hf.shapes import base_model
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    Backend,
    LinearPiece,
    LinearShape,
    Run,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import LinearMixture, Reflection, ScaleMixture
from molehill.kernels.pytorch.backend import TorchBackend

pytest.importorskip("peft", reason="the dev extra is not installed")

ROWS = 5
# The projection of `self_attn` at which each is tried.
PLACES = {
    "lora-bias": "q_proj",
    "adalora": "q_proj",
    "vera": "q_proj",
    "vera-seeded": "k_proj",
    "loha": "v_proj",
    "lokr": "k_proj",
    "lokr-both": "o_proj",
    "hra": "q_proj",
    "miss": "k_proj",
    "miss-mini": "k_proj",
    "ia3": "k_proj",
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: Any) -> Any:
    """By name: the adapter as it is read, and PEFT's module; each made once."""
    base, made = base_model(TINY_LLAMA), {}

    def make(name: str) -> Any:
        if name not in made:
            directory = tmp_path_factory.mktemp("tuned")
            model = tuners.save(name, directory)
            block = model.base_model.model.model.layers[1].self_attn
            adapter = formats.read(directory, base=base)
            made[name] = adapter, getattr(block, PLACES[name])
        return made[name]

    return make


@pytest.fixture(params=["cpu", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request: Any) -> Backend:
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        return triton_cases.backend(replace(triton_cases.CAPACITY, vectors=True))
    return TorchBackend() if request.param == "torch" else CpuBackend()


def served(adapter: Any, site: str, weight: torch.Tensor, handle: int) -> SlotWeights:
    """One site as the worker cuts it for a rank that is alone."""
    mixture = adapter.sites[site]
    if isinstance(mixture, ScaleMixture):
        piece = ScalePiece(site, mixture.policy, mixture.router, mixture.vectors)
        return SlotWeights({}, {}, {handle: [piece]})
    added = adapter.biases[site].added if site in adapter.biases else None
    if isinstance(mixture, Reflection):
        pair = mixture.pair(weight)
    else:
        assert isinstance(mixture, LinearMixture)
        pair = mixture.experts
    linear = LinearPiece(site, 0, pair, mixture.policy, added_bias=added)
    return SlotWeights({handle: [linear]}, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_one_linear_gives_what_pefts_module_gives(backend: Backend, tuned: Any, name: str) -> None:
    adapter, module = tuned(name)
    weight = module.get_base_layer().weight.float()
    out, inputs = weight.shape
    handle = backend.register_linear(LinearShape("linear", inputs, out))
    site = f"layers.1.self_attn.{PLACES[name]}"
    backend.store(1, served(adapter, site, weight, handle))
    x = random(ROWS, inputs, seed=2)
    y = x @ weight.T
    base = y.clone()
    backend.begin_step([Run(1, 1, ROWS)])
    backend.linear(y, x, handle)
    expected = module(x)
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
    assert_near(y[1:], expected[1:], torch.float32)
    assert torch.equal(y[:1], base[:1])
