"""Biases that PEFT saves, on models that have some: `bias`, `lora_bias`, and both, against PEFT."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.broken import refusal
from support.fused_experts import TOKENS, logits_of

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.validation import check, problems
from molehill.engine.formats import native
from molehill.engine.formats.convert.peft_writer import write_lora
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.arrow import Lora, arrow
from molehill.engine.transform.merge import merge_static
from molehill.engine.transform.merge_checkpoint import merge_checkpoint
from molehill.engine.transform.weighted_sum import Part, mix
from molehill.kernels.mixture import Bias
from molehill.kernels.policy import Arrow

P = "base_model.model.model.layers.1"
Q, K = "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories: Qwen2 has biases on q, k and v alone, Phi on all linears and on its norms."""
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_models.build(name, root) for name in ("qwen2", "phi")}


def save(base, directory, config):
    """PEFT's logits of an adapter whose trainable numbers are random."""
    torch.manual_seed(4)
    model = peft.get_peft_model(tiny_models.load(base), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    return logits_of(model, TOKENS)


def lora(targets=("q_proj",), **options):
    options = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(target_modules=list(targets), **options)


OTHERS = {
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "hra": peft.HRAConfig(r=2, target_modules=["q_proj"], bias="all", init_weights=False),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj"], bias="all"),
    "adalora": peft.AdaLoraConfig(
        init_r=3, target_r=3, total_step=10, target_modules=["q_proj"], bias="all"
    ),
}
ALL = {
    "trained where it is adapted or not": ("qwen2", lora(("q_proj", "o_proj"), bias="all")),
    "trained at the adapted": ("phi", lora(("q_proj", "dense", "fc2"), bias="lora_only")),
    "in lora_B": ("qwen2", lora(("k_proj", "down_proj"), lora_bias=True, use_rslora=True)),
    "both": ("qwen2", lora(("q_proj", "v_proj"), bias="all", lora_bias=True)),
    "with DoRA": ("qwen2", lora(("q_proj", "k_proj"), bias="all", use_dora=True)),
    **{name: ("qwen2", config) for name, config in OTHERS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_reference_answers_as_peft_does(bases, tmp_path, name):
    base, config = bases[ALL[name][0]], ALL[name][1]
    expected, shapes = save(base, tmp_path, config), base_model(base)
    adapter = formats.read(tmp_path, base=shapes)
    assert adapter.warnings == ()
    assert adapter.biases
    assert problems(adapter, shapes, Limits()) == []
    model = tiny_models.load(base)
    before = logits_of(model, TOKENS)
    with attach(model, replace(adapter, biases={})):
        assert (logits_of(model, TOKENS) - expected).abs().max() > 0.05
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits_of(model, TOKENS), before)
    native.write(adapter, tmp_path / "native")
    copy = formats.read(tmp_path / "native")
    assert copy.digest == adapter.digest != replace(adapter, biases={}).digest
    assert native.read_stored(tmp_path / "native").digest == adapter.digest
    if name in ("hra", "vera"):
        return
    merged, _ = merge_static(adapter)
    if "lora_B" in name:
        with pytest.raises(UnsupportedError, match=r"down_proj\.bias: found a bias, and the base"):
            merge_checkpoint(base, merged, tmp_path / "merged")
        return
    merge_checkpoint(base, merged, tmp_path / "merged")
    result = logits_of(tiny_models.load(tmp_path / "merged"), TOKENS)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_a_merged_lora_keeps_what_lora_b_adds(bases, tmp_path):
    """PEFT itself reads what `molehill merge` writes."""
    base = bases["qwen2"]
    expected = save(base, tmp_path / "a", lora(("q_proj", "up_proj"), lora_bias=True))
    merged, _ = merge_static(formats.read(tmp_path / "a"))
    partly = {site: bias for site, bias in merged.biases.items() if site != Q}
    write_lora(merged, tmp_path / "b")
    model = peft.PeftModel.from_pretrained(tiny_models.load(base), tmp_path / "b")
    torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=1e-4)
    write_lora(replace(merged, biases=partly), tmp_path / "c")
    again = dict(formats.read(tmp_path / "c").biases)
    assert not again.pop(Q).added.any()
    assert all(torch.equal(again[site].added, bias.added) for site, bias in partly.items())
    trained = {Q: Bias(trained=torch.zeros(64))}
    for biases, match in (
        (trained, "a trained bias"),
        ({K: Bias(added=torch.ones(32))}, "without"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            write_lora(replace(merged, biases=biases), tmp_path / "d")


def test_norms_biases_are_refused_with_what_would_be_served(bases, tmp_path):
    save(bases["phi"], tmp_path, lora(bias="all"))
    error = refusal(UnsupportedError, tmp_path)
    assert error.found.startswith("a trained bias of ")
    assert "lora_only when it is trained" in error.expected
    assert "merge_and_unload" in error.expected


@pytest.fixture(scope="module")
def biased(bases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("biased")
    save(bases["qwen2"], directory, lora(bias="all", lora_bias=True))
    return directory


@pytest.mark.parametrize(
    ("config", "tensors", "error", "where"),
    [
        ({"bias": "none"}, {}, UnsupportedError, "self_attn.k_proj.bias"),
        ({"lora_bias": False}, {}, UnsupportedError, "q_proj.lora_B.bias"),
        ({}, {"q_proj.lora_B.bias": None}, MissingTensorError, "q_proj.lora_B.bias"),
        ({"use_dora": True}, {}, UnsupportedError, "lora_bias"),
        ({}, {"q_proj.bias": torch.ones(64)}, CorruptFileError, "self_attn.q_proj.bias"),
        ({}, {"k_proj.bias": torch.ones(2, 16)}, ShapeError, "self_attn.k_proj.bias"),
        ({}, {"q_proj.lora_B.bias": torch.ones(3)}, ShapeError, "q_proj.bias"),
    ],
)
def test_a_file_that_contradicts_its_config(biased, tmp_path, config, tensors, error, where):
    fields = json.loads((biased / "adapter_config.json").read_text()) | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    values = load_file(biased / "adapter_model.safetensors")
    values |= {f"{P}.self_attn.{name}": tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in values.items() if tensor is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    assert where in refusal(error, tmp_path).where


def test_a_base_without_the_bias_is_not_the_one_it_was_trained_from(bases, biased):
    adapter, shapes = formats.read(biased), base_model(bases["qwen2"])
    assert Q in shapes.biased
    assert "layers.1.mlp.up_proj" not in shapes.biased
    (error, *_) = problems(adapter, replace(shapes, biased=frozenset()), Limits())
    assert (type(error), error.found) == (
        UnsupportedError,
        "a trained bias, and the base's linear has none",
    )
    norm, bare = "layers.1.input_layernorm", "layers.1.self_attn.v_proj"
    strange = {norm: Bias(added=torch.ones(64)), bare: Bias(added=torch.ones(3))}
    unknown, wide = problems(replace(adapter, biases=strange), shapes, Limits())
    assert (type(unknown), type(wide)) == (UnknownTargetError, ShapeError)


def only_added(adapter):
    biases = adapter.biases.items()
    return {site: Bias(added=bias.added) for site, bias in biases if bias.added is not None}


def test_an_activated_adapter_has_none_of_the_bases(biased):
    """PEFT's own has them on every token, before the invocation too."""
    adapter = replace(formats.read(biased), invocation_tokens=(5,))
    with pytest.raises(UnsupportedError, match=r"beside alora_invocation_tokens, expected lora_bi"):
        check(adapter, Limits())
    added = only_added(adapter)
    check(replace(adapter, biases=added), Limits())


def test_mixes_add_up_what_lora_b_adds(biased):
    adapter = formats.read(biased)
    with pytest.raises(UnsupportedError, match=r"one: layers\.\d\.\S+\.bias: found a trained bias"):
        mix([Part("one", adapter, 1.0)])
    with pytest.raises(UnsupportedError, match="a bias, which Arrow's routing has no gate weight"):
        arrow([Lora("one", adapter, {})], Arrow(1))
    added = only_added(adapter)
    plain = replace(adapter, biases=added)
    both = mix([Part("one", plain, 0.5), Part("two", plain, 2.0)])
    torch.testing.assert_close(both.biases[Q].added, 2.5 * added[Q].added)
