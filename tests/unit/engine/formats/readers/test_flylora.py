"""FlyLoRA's files: what is read of them, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.broken import refusal

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    LimitError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.kernels.policy import FlyLoRA

SITE = "layers.1.mlp.down_proj"
STEM = f"base_model.model.model.{SITE}"
BIASES = f"{STEM}.lora_topk_bias"


@pytest.fixture
def stored(golden):
    return load_file(golden / "cases" / "flylora" / "adapter_model.safetensors")


def test_ranks_are_experts_and_a_is_the_router(golden, stored):
    mixture = formats.read(golden / "cases" / "flylora").sites[SITE]
    assert mixture.policy == FlyLoRA(3, experts=8)
    assert mixture.experts.ranks == (1,) * 8
    assert torch.equal(mixture.router, stored[f"{STEM}.lora_A.weight"])
    assert torch.equal(mixture.experts.a, stored[f"{STEM}.lora_A.weight"])
    assert torch.equal(mixture.experts.b, stored[f"{STEM}.lora_B.weight"] * 2)
    assert torch.equal(mixture.parameters, stored[BIASES])


@pytest.mark.parametrize(
    ("config", "k", "scaling"),
    [
        ({"top_k": 8}, 8, 2.0),
        ({"use_rslora": True}, 3, 16 / 8**0.5),
        ({"init_lora_weights": "sparse"}, 3, 2.0),
        ({"bias_u": None}, 3, 2.0),
    ],
    ids=str,
)
def test_the_config_is_followed(edited, stored, config, k, scaling):
    mixture = formats.read(edited("flylora", config, safetensors=True)).sites[SITE]
    assert isinstance(mixture.policy, FlyLoRA)
    assert mixture.policy.k == k
    torch.testing.assert_close(mixture.experts.b, stored[f"{STEM}.lora_B.weight"] * scaling)


@pytest.mark.parametrize("sign", ["bias_u", "top_k"])
def test_without_its_biases_it_is_no_plain_lora(edited, stored, sign):
    """The config alone tells that the answers would be others."""
    config = {"bias_u": None, "top_k": None, sign: 2}
    gone = {name: None for name in stored if name.endswith("lora_topk_bias")}
    error = refusal(MissingTensorError, edited("flylora", config, gone, safetensors=True))
    assert error.where.endswith("lora_topk_bias")


@pytest.mark.parametrize(
    ("kind", "config", "tensors", "message"),
    [
        (ShapeError, {}, {BIASES: torch.zeros(7)}, "found [7], expected [8]"),
        (ConfigError, {"top_k": 9}, {}, "top_k: found 9, expected at most the rank, 8"),
        (ConfigError, {"top_k": None}, {}, "top_k: found nothing"),
        (UnsupportedError, {"use_dora": True}, {}, "use_dora: found DoRA"),
        (UnsupportedError, {"rank_pattern": {"q_proj": 4}}, {}, "ranks by pattern"),
        (UnsupportedError, {"init_lora_weights": "pissa"}, {}, "which changes the base weights"),
        (UnsupportedError, {}, {f"{STEM}.lora_gate.weight": torch.ones(2)}, "an unknown tensor"),
    ],
    ids=str,
)
def test_what_is_refused(edited, kind, config, tensors, message):
    assert message in str(refusal(kind, edited("flylora", config, tensors, safetensors=True)))


def test_more_ranks_than_experts_are_allowed_are_refused_with_the_limit(golden):
    with pytest.raises(LimitError, match=r"found experts 8, expected at most 7"):
        formats.read(golden / "cases" / "flylora", Limits(experts=7))


def test_arrow_does_not_take_it_for_a_lora(edited, stored):
    gone = {name: None for name in stored if name.endswith("lora_topk_bias")}
    member = edited("flylora", {}, gone, safetensors=True)
    document = {"kind": "arrow", "adapters": [member.name], "top_k": 1}
    (member.parent / "molehill_mix.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="bias_u: found FlyLoRA, which has a router"):
        formats.read(member.parent)
