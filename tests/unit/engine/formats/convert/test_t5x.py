"""MoLoRA and MoV out of T5X arrays, against the formulas in numpy, laid out as their authors do."""

import numpy as np
import pytest
import torch

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.engine.formats.convert import t5x
from molehill.kernels.reference import linear_mixture, scale_mixture

PATH = "decoder/layers_3/mlp/wi_lora"
KERNEL = f"{PATH}/router/router_weights/v/kernel"
BIAS = KERNEL.replace("kernel", "bias")
MODULES = {PATH: "layers.3.mlp.up_proj"}
EXPERTS, INPUTS, RANK, OUTPUTS, TOKENS = 5, 12, 3, 7, 9


@pytest.fixture
def arrays():
    random = np.random.default_rng(20230)
    return {
        f"{PATH}/lora_A": random.normal(size=(EXPERTS, INPUTS, RANK)).astype(np.float32),
        f"{PATH}/lora_B": random.normal(size=(EXPERTS, RANK, OUTPUTS)).astype(np.float32),
        KERNEL: random.normal(size=(INPUTS, EXPERTS)).astype(np.float32),
        "decoder/layers_3/mlp/wi/kernel": random.normal(size=(INPUTS, OUTPUTS)),
    }


def molora(arrays, x, alpha, top_k):
    """The authors' einsums, in float64."""
    a, b = (arrays[f"{PATH}/lora_{half}"].astype(np.float64) for half in "AB")
    logits = x @ arrays[KERNEL].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if top_k is not None:
        smallest = np.sort(p, axis=-1)[:, -top_k, None]
        p = np.where(p >= smallest, p, 0)
    each = np.einsum("ter,erd->ted", np.einsum("td,edr->ter", x, a), b)
    return np.einsum("te,ted->td", p, each) * (alpha / a.shape[-1])


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("alpha", [16.0, 5.0])
def test_the_formula(arrays, alpha, top_k):
    adapter = t5x.convert(arrays, MODULES, alpha=alpha, top_k=top_k, base_model="base")
    assert (adapter.kind, adapter.base_model) == ("molora", "base")
    (site,) = adapter.sites.values()
    x = np.random.default_rng(7).normal(size=(TOKENS, INPUTS))
    weight = torch.from_numpy(arrays["decoder/layers_3/mlp/wi/kernel"]).float().T
    result, _ = linear_mixture(torch.from_numpy(x).float(), weight, None, site)
    delta = molora(arrays, x, alpha, top_k)
    expected = x @ arrays["decoder/layers_3/mlp/wi/kernel"] + delta
    assert np.abs(delta).max() > 1
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-4)


def test_soft_mixing_with_alpha_16_is_the_default(arrays):
    result = t5x.convert(arrays, MODULES)
    assert result.digest == t5x.convert(arrays, MODULES, alpha=16, top_k=None).digest
    assert result.digest != t5x.convert(arrays, MODULES, alpha=8).digest
    assert result.digest != t5x.convert(arrays, MODULES, top_k=EXPERTS).digest


def test_the_native_format_keeps_it(arrays, tmp_path):
    adapter = t5x.convert(arrays, MODULES, top_k=2)
    native.write(adapter, tmp_path / "molora")
    assert formats.read(tmp_path / "molora").digest == adapter.digest


def test_an_npz_file_is_a_mapping(arrays, tmp_path):
    np.savez(tmp_path / "checkpoint.npz", **arrays)
    with np.load(tmp_path / "checkpoint.npz", allow_pickle=False) as loaded:
        assert t5x.convert(loaded, MODULES).digest == t5x.convert(arrays, MODULES).digest


def test_a_bias_of_zeros_is_none(arrays):
    adapter = t5x.convert({**arrays, BIAS: np.zeros(EXPERTS)}, MODULES)
    assert adapter.digest == t5x.convert(arrays, MODULES).digest


A, B = f"{PATH}/lora_A", f"{PATH}/lora_B"


@pytest.mark.parametrize(
    ("changes", "kind", "where"),
    [
        ({BIAS: np.ones(EXPERTS)}, UnsupportedError, BIAS),
        ({"decoder/layers_0/mov_scaling": np.ones((2, 3))}, UnsupportedError, "mov_scaling"),
        ({"decoder/layers_0/lora_A": np.ones((2, 3, 4))}, UnsupportedError, "layers_0/lora_A"),
        ({A: None}, MissingTensorError, A),
        ({B: None}, MissingTensorError, B),
        ({KERNEL: None}, MissingTensorError, "router"),
        ({f"{PATH}/router2/kernel": np.ones((INPUTS, EXPERTS))}, MissingTensorError, "router"),
        ({A: np.ones((INPUTS, RANK))}, ShapeError, A),
        ({B: np.ones((EXPERTS, RANK + 1, OUTPUTS))}, ShapeError, B),
        ({B: np.ones((EXPERTS, RANK, 2, 3))}, ShapeError, B),
        ({KERNEL: np.ones((EXPERTS, INPUTS))}, ShapeError, KERNEL),
        ({A: np.full((EXPERTS, INPUTS, RANK), np.nan)}, NonFiniteError, A),
        ({A: np.full((EXPERTS, INPUTS, RANK), "x")}, UnsupportedError, A),
        ({B: np.zeros((EXPERTS, RANK, OUTPUTS))}, NothingBoundError, "adapter"),
    ],
)
def test_what_cannot_be_converted(arrays, changes, kind, where):
    for name, value in changes.items():
        arrays[name] = value
        if value is None:
            del arrays[name]
    with pytest.raises(kind) as caught:
        t5x.convert(arrays, MODULES)
    assert where in caught.value.where


def test_arguments_are_checked(arrays):
    with pytest.raises(ConfigError, match="alpha"):
        t5x.convert(arrays, MODULES, alpha=0)
    with pytest.raises(ConfigError, match="top_k"):
        t5x.convert(arrays, MODULES, top_k=0)
    with pytest.raises(LimitError, match="rank 3"):
        t5x.convert(arrays, MODULES, limits=Limits(rank=2))


def test_two_paths_for_one_module(arrays):
    arrays |= {name.replace("wi_lora", "wj_lora"): array for name, array in arrays.items()}
    modules = {**MODULES, PATH.replace("wi_lora", "wj_lora"): "layers.3.mlp.up_proj"}
    with pytest.raises(ConfigError, match="no other path"):
        t5x.convert(arrays, modules)


K, WI = "decoder/layers_0/self_attention/key_mov", "decoder/layers_0/mlp/wi_mov"
MOV_MODULES = {K: "layers.0.self_attn.k_proj", WI: "layers.0.mlp.down_proj"}
HEADS, WIDTH = 2, 6


@pytest.fixture
def vectors():
    random = np.random.default_rng(9054)
    return {
        f"{K}/mov_scaling": random.normal(size=(HEADS, EXPERTS, WIDTH)).astype(np.float32),
        f"{K}/router/router_weights/v/kernel": random.normal(size=(WIDTH, EXPERTS)),
        f"{WI}/mov_scaling": random.normal(size=(EXPERTS, INPUTS)).astype(np.float32),
        f"{WI}/router/router_weights/v/kernel": random.normal(size=(INPUTS, EXPERTS)),
    }


def mov(u, scaling, kernel):
    """u * sum_e p_e l_e, p = softmax(u kernel), in float64; u `[..., width]`."""
    logits = u @ kernel
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if scaling.ndim == 3:
        return u * np.einsum("the,hew->thw", p, scaling)
    return u * (p @ scaling)


def test_mov_rescales_heads_and_an_intermediate(vectors, tmp_path):
    adapter = t5x.convert(vectors, MOV_MODULES)
    assert adapter.kind == "mov"
    random = np.random.default_rng(7)
    for path, site, shape in (
        (K, "layers.0.self_attn.k_proj", (TOKENS, HEADS, WIDTH)),
        (WI, "layers.0.mlp.down_proj", (TOKENS, INPUTS)),
    ):
        u = random.normal(size=shape)
        names = f"{path}/mov_scaling", f"{path}/router/router_weights/v/kernel"
        expected = mov(u, *(vectors[name].astype(np.float64) for name in names))
        flat = torch.from_numpy(u).float().flatten(1)
        result, _ = scale_mixture(flat, adapter.sites[site])
        np.testing.assert_allclose(result.numpy(), expected.reshape(TOKENS, -1), atol=1e-5)
        assert adapter.sites[site].of == ("output" if path == K else "input")
    native.write(adapter, tmp_path / "mov")
    assert formats.read(tmp_path / "mov").digest == adapter.digest


@pytest.mark.parametrize(
    ("changes", "kind", "where"),
    [
        ({f"{K}/mov_scaling": np.ones((EXPERTS,))}, ShapeError, f"{K}/mov_scaling"),
        ({f"{WI}/mov_scaling": np.ones((EXPERTS, 3))}, ShapeError, f"{WI}/router"),
        ({f"{K}/lora_A": np.ones((EXPERTS, INPUTS, RANK))}, UnsupportedError, "mov_scaling"),
        ({"other/mov_scaling": np.ones((2, 3))}, UnsupportedError, "other/mov_scaling"),
        ({f"{K}/router/bias": np.ones(EXPERTS)}, UnsupportedError, f"{K}/router/bias"),
        ({f"{K}/router/router_weights/v/kernel": None}, MissingTensorError, f"{K}/...router"),
    ],
)
def test_vectors_that_cannot_be_converted(vectors, changes, kind, where):
    arrays = {name: array for name, array in (vectors | changes).items() if array is not None}
    with pytest.raises(kind) as caught:
        t5x.convert(arrays, MOV_MODULES)
    assert where.replace("...", ".../") in caught.value.where
