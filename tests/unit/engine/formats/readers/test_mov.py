"""MoV: what its reader makes of the golden case, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    MissingTensorError,
    NothingBoundError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check, problems
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.plan import plan
from molehill.kernels.mixture import Experts, FfnMixture, ScaleMixture
from molehill.kernels.policy import AdaMoLE, Soft, TopK

K = "mov.layers.1.self_attn.k_proj"
DOWN = "mov.layers.1.mlp.down_proj"


@pytest.fixture
def changed(golden, tmp_path):
    """`changed(tensors={...}, config={...})`: the golden case with other values; None removes."""

    def change(tensors=None, config=None):
        source = golden / "cases" / "mov"
        values = load_file(source / "adapter_model.safetensors") | (tensors or {})
        fields = json.loads((source / "adapter_config.json").read_text()) | (config or {})
        kept = {name: value for name, value in values.items() if value is not None}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        return tmp_path

    return change


def test_vectors_and_routers_are_the_files(golden):
    raw = load_file(golden / "cases" / "mov" / "adapter_model.safetensors")
    sites = formats.read(golden / "cases" / "mov").sites
    k, down = sites["layers.1.self_attn.k_proj"], sites["layers.1.mlp.down_proj"]
    assert (k.of, k.num_heads, k.num_experts) == ("output", 2, 4)
    assert (down.of, down.num_heads, down.num_experts) == ("input", 1, 4)
    assert torch.equal(k.vectors, raw[f"{K}.mov_scaling"].float())
    assert torch.equal(k.router, raw[f"{K}.router.weight"].float())
    assert torch.equal(down.vectors[0], raw[f"{DOWN}.mov_scaling"].float())


def test_the_plan_names_its_shape(golden):
    sites = {site.site: site for site in plan(formats.read(golden / "cases" / "mov"))}
    k = sites["layers.0.self_attn.k_proj"]
    assert (k.shape, k.experts, k.ranks, k.static) == ("scale", 4, {}, False)
    assert k.bytes == 4 * (2 * 4 * 32 + 4 * 32)
    assert k.reason == "router reads the token"


@pytest.mark.parametrize(
    ("vectors", "router", "policy", "reason"),
    [
        (torch.rand(2, 1, 8), torch.rand(1, 8), TopK(1), "one expert"),
        (torch.rand(2, 3, 8), torch.zeros(3, 8), Soft(), "router of zeros"),
        (torch.full((2, 3, 8), 2.0), torch.rand(3, 8), Soft(), "identical experts"),
        (torch.full((2, 3, 8), 2.0), torch.rand(3, 8), TopK(2, normalize=False), None),
        (torch.rand(2, 3, 8), torch.rand(3, 8), Soft(), None),
    ],
)
def test_static_vectors(vectors, router, policy, reason):
    (site,) = plan(Adapter("mov", {"layers.0.x": ScaleMixture(vectors, policy, router)}))
    assert site.static == (reason is not None)
    assert site.reason.startswith(reason or "router reads the token")


@pytest.mark.parametrize(
    ("tensors", "kind", "where", "message"),
    [
        ({f"{K}.router.weight": None}, MissingTensorError, f"{K}.router", "no such tensor"),
        ({f"{K}.mov_scaling": None}, MissingTensorError, f"{K}.mov_scaling", "no such tensor"),
        ({f"{K}.router.bias": torch.ones(4)}, UnsupportedError, f"{K}.router.bias", "an unknown"),
        ({f"{K}.mov_scaling": torch.ones(2, 3, 32)}, ShapeError, f"{K}.mov", "[2, 3, 32]"),
        ({f"{K}.mov_scaling": torch.ones(2, 4, 31)}, ShapeError, f"{K}.mov", "[2, 4, 31]"),
        ({f"{K}.mov_scaling": torch.ones(32)}, ShapeError, f"{K}.mov_scaling", "[32]"),
        ({f"{DOWN}.mov_scaling": torch.ones(4, 32)}, ShapeError, f"{DOWN}.mov", "[4, 32]"),
        ({f"{K}.router.weight": torch.ones(5, 32)}, ShapeError, f"{K}.router", "5 experts"),
        (
            {f"{DOWN}.mov_scaling": None, f"{DOWN}.router.weight": None},
            MissingTensorError,
            "layers.1.mlp.down_proj",
            "no tensors",
        ),
    ],
)
def test_tensors_that_are_wrong(changed, tensors, kind, where, message):
    error = refusal(kind, changed(tensors))
    assert where in error.where
    assert message in error.found


def test_configs_that_are_wrong(changed):
    assert "num_experts" in refusal(ConfigError, changed(config={"num_experts": 0})).where
    error = refusal(ShapeError, changed(config={"num_experts": 5}))
    assert (error.found, error.expected) == ("4 experts", "num_experts 5")
    assert "top_k" in refusal(UnsupportedError, changed(config={"top_k": 2})).where
    error = refusal(UnsupportedError, changed(config={"target_modules": ["k_proj", "v_proj"]}))
    assert "down_proj" in error.where


def test_vectors_of_ones_are_the_base_in_disguise(golden, changed):
    raw = load_file(golden / "cases" / "mov" / "adapter_model.safetensors")
    ones = {name: torch.ones_like(t) for name, t in raw.items() if name.endswith("mov_scaling")}
    refusal(NothingBoundError, changed(ones))


def scales(heads, width, of="output"):
    return ScaleMixture(torch.full((heads, 2, width), 2.0), Soft(), torch.ones(2, width), of)


@pytest.mark.parametrize(
    ("site", "mixture", "kind", "message"),
    [
        ("layers.0.self_attn.k_proj", scales(3, 32), ShapeError, "3 heads of width 32"),
        ("layers.0.mlp.down_proj", scales(1, 64, "input"), ShapeError, "1 heads of width 64"),
        ("layers.0.mlp.up_proj", scales(1, 64, "input"), UnsupportedError, "on its input"),
        ("layers.0.self_attn.x_proj", scales(2, 32), UnknownTargetError, "no such linear"),
        ("layers.9.mlp.down_proj", scales(1, 176, "input"), UnknownTargetError, "no such linear"),
    ],
)
def test_vectors_that_do_not_fit_the_base(golden, site, mixture, kind, message):
    adapter = Adapter("mov", {site: mixture})
    (problem,) = problems(adapter, base_model(golden / "tiny-llama"), formats.DEFAULT_LIMITS)
    assert type(problem) is kind
    assert message in problem.found


def test_a_policy_with_rows_of_its_own_over_vectors():
    mixture = ScaleMixture(torch.full((2, 2, 8), 2.0), AdaMoLE(0.5), torch.ones(2, 8))
    with pytest.raises(UnsupportedError, match="AdaMoLE over vectors"):
        check(Adapter("mov", {"layers.0.x": mixture}), formats.DEFAULT_LIMITS)


def test_vectors_beside_experts_inside_the_same_ffn(golden):
    pair = Experts(torch.ones(2, 64), torch.ones(176, 2), (1, 1))
    ffn = FfnMixture({"up_proj": pair}, Soft(), torch.ones(2, 64))
    sites = {"layers.0.mlp": ffn, "layers.0.mlp.down_proj": scales(1, 176, "input")}
    result = problems(
        Adapter("mov", sites), base_model(golden / "tiny-llama"), formats.DEFAULT_LIMITS
    )
    assert [type(problem) for problem in result] == [UnsupportedError]
