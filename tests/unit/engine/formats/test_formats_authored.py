"""AdaMoLE, MoLE and LD-MoLE as their authors save them: read, served by the reference, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.authored import EXPERTS, HIDDEN, METHODS, tiny_llama
from support.golden import greatest_difference

from molehill.api.cli import main
from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.kernels.policy import AdaMoLE, Constant, Soft, Sparsegen, Threshold, TopK

LOGITS = 1e-3
# LD-MoLE divides logits by as little as 0.01, and their rounding with them.
WEIGHTS = {"ldmole": 1e-4}
NAMES = [method.name for method in METHODS]
POLICIES = {
    "mole-top-k": ("mole", TopK(2)),
    "mole-threshold": ("mole", Threshold(0.3)),
    "adamole": ("adamole", AdaMoLE(0.25)),
    "adamole-high": ("adamole", AdaMoLE(0.8)),
    "ldmole": ("ldmole", Sparsegen(HIDDEN)),
}
Q, DOWN = "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"
STEM = f"base_model.model.model.{Q}"


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", NAMES)
def test_kind_policy_and_sites(authored, name):
    adapter = formats.read(authored[name].path)
    kind, policy = POLICIES[name]
    assert (adapter.kind, adapter.base_model) == (kind, "tiny-llama")
    # LD-MoLE's authors name a classifier, which their causal models have not.
    said = ["modules_to_save is ['score'], but there are no tensors for it: no effect"]
    assert list(adapter.warnings) == said * (name == "ldmole")
    assert {mixture.policy for mixture in adapter.sites.values()} == {policy}
    assert len(adapter.sites) == 8
    site = adapter.sites[Q]
    assert site.router.shape == (EXPERTS + policy.extra_rows, 64)
    assert (site.parameters is None) == (policy.num_parameters == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_the_authors_logits_tokens_and_weights(authored, model, name):
    made, trace = authored[name], {}
    with attach(model, formats.read(made.path), trace):
        for i, prompt in enumerate(made.prompts):
            tokens = list(prompt.ids)
            first = logits_of(model, tokens)
            if i == 0:
                result = {site: entries[0].weights for site, entries in trace.items()}
            assert greatest_difference(first, prompt.logits) < LOGITS
            for _ in prompt.greedy:
                tokens.append(int(logits_of(model, tokens).argmax()))
            assert tuple(tokens[len(prompt.ids) :]) == prompt.greedy
    assert result.keys() == made.routes.keys()
    for site, weights in made.routes.items():
        assert greatest_difference(result[site], weights) < WEIGHTS.get(name, 1e-5), site


def test_the_cases_reach_what_is_special_of_their_methods(authored):
    """Or the tests above could pass without it."""
    counts = {
        name: torch.cat([(w > 0).sum(-1) for w in authored[name].routes.values()]) for name in NAMES
    }
    assert set(counts["mole-top-k"].tolist()) == {2}
    for name in ("mole-threshold", "adamole", "ldmole"):
        assert len(set(counts[name].tolist())) > 1, name
    assert 0 in counts["adamole-high"]


@pytest.mark.parametrize("name", NAMES)
def test_native_round_trip_keeps_the_digest(authored, tmp_path, name):
    adapter = formats.read(authored[name].path)
    native.write(adapter, tmp_path / "native")
    again = formats.read(tmp_path / "native")
    assert (again.digest, again.kind) == (adapter.digest, adapter.kind)


def test_a_parameter_is_part_of_the_digest(authored, edited):
    name = f"{STEM}.lora_threshold.bias"
    changed = edited(authored["adamole"].path, tensors={name: lambda t: t + 1})
    assert formats.read(changed).digest != formats.read(authored["adamole"].path).digest


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_inspect_shows_it(authored, golden, capsys, name):
    arguments = ["inspect", str(authored[name].path), "--model", str(golden / "tiny-llama")]
    assert main.main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["problems"]) == (POLICIES[name][0], [])
    assert {site["routing"]["policy"] for site in shown["sites"]} == {
        type(POLICIES[name][1]).__name__
    }
    assert not any(site["static"] for site in shown["sites"])
    assert main.main(arguments) == 0


def test_the_greatest_threshold_may_be_in_the_config(authored, edited):
    adapter = formats.read(edited(authored["adamole"].path, {"max_threshold": 0.5}))
    assert adapter.sites[Q].policy == AdaMoLE(0.5)


def test_one_lora_is_a_plain_lora(authored, edited):
    """LD-MoLE with one expert has no router."""
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    gone = {
        name: None
        for name in tensors
        if "lora_route" in name
        or any(f"lora_{half}{e}" in name for half in "AB" for e in (1, 2, 3))
    }
    adapter = formats.read(edited(path, {"lora_nums": 1}, gone))
    site = adapter.sites[Q]
    assert (site.policy, site.router) == (Constant((1.0,)), None)
    assert torch.equal(site.experts.b, tensors[f"{STEM}.lora_B0.weight"] * 2)


def test_without_sparsegen_ld_mole_is_loramoe(authored, edited):
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    gone = {name: None for name in tensors if "sparsegen" in name}
    config = {"sparsegen_cfg": {"enabled": False}, "modules_to_save": None}
    adapter = formats.read(edited(path, config, gone))
    assert (adapter.kind, adapter.sites[Q].policy) == ("loramoe", Soft())


def test_one_copy_of_the_shared_mlp_is_enough(authored, edited):
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    gone = {name: None for name in tensors if ".sparsegen.mlp" in name}
    adapter = formats.read(edited(path, tensors=gone))
    assert adapter.digest == formats.read(path).digest


def refused(kind, path):
    with pytest.raises(kind) as caught:
        formats.read(path)
    assert type(caught.value) is kind
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name", "change", "kind", "message"),
    [
        ("adamole", "lora_gating.weight", None, MissingTensorError, "no such tensor"),
        ("adamole", "lora_threshold.weight", None, MissingTensorError, "no such tensor"),
        ("adamole", "lora_threshold.bias", None, MissingTensorError, "no such tensor"),
        ("adamole", "lora_A.2.weight", None, MissingTensorError, "no such tensor"),
        ("adamole", "lora_threshold.weight", torch.ones(2, 64), ShapeError, "[2, 64]"),
        ("adamole", "lora_threshold.weight", torch.ones(1, 63), ShapeError, "[1, 63]"),
        ("adamole", "lora_threshold.bias", torch.ones(2), ShapeError, "[2]"),
        ("adamole", "lora_threshold.bias", torch.ones(1, 1), ShapeError, "[1, 1]"),
        ("adamole", "lora_gating.weight", torch.ones(5, 64), ShapeError, "5 experts"),
        ("adamole", "lora_gating.bias", torch.ones(4), UnsupportedError, "an unknown tensor"),
        ("adamole", "lora_A.4.weight", torch.ones(2, 64), UnsupportedError, "an unknown tensor"),
        (
            "adamole",
            "moe_layer.experts.1.lora_B.weight",
            lambda t: t + 1,
            CorruptFileError,
            "other values",
        ),
        ("mole-top-k", "lora_threshold.bias", torch.ones(1), UnsupportedError, "an unknown tensor"),
        ("ldmole", "lora_route.weight", None, MissingTensorError, "no such tensor"),
        ("ldmole", "lora_B3.weight", None, MissingTensorError, "no such tensor"),
        ("ldmole", "lora_route.weight", torch.ones(3, 64), ShapeError, "3 experts"),
        (
            "ldmole",
            "sparsegen.mlp.proj_layers.64.0.weight",
            lambda t: t * 2,
            CorruptFileError,
            "other values",
        ),
        (
            "ldmole",
            "sparsegen.mlp.proj_layers.64.0.bias",
            torch.ones(6),
            CorruptFileError,
            "other values",
        ),
        ("ldmole", "sparsegen.mlp.64.weight", torch.ones(6), UnsupportedError, "an unknown tensor"),
        ("ldmole", "sparsegen.gate.weight", torch.ones(6), UnsupportedError, "an unknown tensor"),
    ],
)
def test_a_broken_file_is_refused_by_name(authored, edited, case, name, change, kind, message):
    error = refused(kind, edited(authored[case].path, tensors={f"{STEM}.{name}": change}))
    assert name in error.where
    assert error.found == message


@pytest.mark.parametrize(
    ("part", "change", "kind"),
    [
        ("64.0.weight", None, MissingTensorError),
        ("64.2.bias", None, MissingTensorError),
        ("64.0.weight", torch.ones(HIDDEN, 63), ShapeError),
        ("64.0.bias", torch.ones(HIDDEN + 1), ShapeError),
        ("64.2.weight", torch.ones(2, HIDDEN), ShapeError),
    ],
)
def test_a_broken_shared_mlp_is_refused_by_name(authored, edited, part, change, kind):
    """In all of its copies."""
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    changes = {name: change for name in tensors if name.endswith(f"proj_layers.{part}")}
    assert len(changes) == 9
    assert part in refused(kind, edited(path, tensors=changes)).where


def test_a_width_without_its_mlp_is_refused(authored, edited):
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    gone = {name: None for name in tensors if ".proj_layers.176." in name}
    error = refused(MissingTensorError, edited(path, tensors=gone))
    assert "proj_layers.176.0.weight" in error.where
    assert "down_proj" in error.expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "config", "kind", "where"),
    [
        ("adamole", {"max_threshold": -0.1}, ConfigError, "max_threshold"),
        ("adamole", {"max_threshold": "0.1"}, ConfigError, "max_threshold"),
        ("adamole", {"lora_rank": None}, ConfigError, "lora_rank"),
        ("adamole", {"lora_rank": 4}, ShapeError, "lora_A.0"),
        ("adamole", {"num_experts": 3}, ShapeError, "lora_gating"),
        ("adamole", {"modules_to_save": "lm_head"}, ConfigError, "modules_to_save"),
        ("mole-top-k", {"top_k": None}, ConfigError, "threshold"),
        ("mole-top-k", {"threshold": 0.3}, ConfigError, "threshold"),
        ("mole-top-k", {"top_k": 0}, ConfigError, "top_k"),
        ("mole-top-k", {"peft_type": "ADAMOLE"}, MissingTensorError, "lora_threshold"),
        ("adamole", {"peft_type": "MOLE", "top_k": 2}, UnsupportedError, "lora_threshold"),
        ("ldmole", {"lora_nums": 5}, ShapeError, "lora_route"),
        ("ldmole", {"sparsegen_cfg": {"enabled": False}}, ConfigError, "sparsegen_cfg"),
        ("ldmole", {"sparsegen_cfg": [1]}, ConfigError, "sparsegen_cfg"),
        ("ldmole", {"use_abs": True}, UnsupportedError, "use_abs"),
        ("ldmole", {"ReLUMoE_cfg": {"enabled": True}}, UnsupportedError, "ReLUMoE_cfg"),
        ("ldmole", {"use_dora": True}, UnsupportedError, "use_dora"),
    ],
)
def test_a_config_that_would_be_served_wrong_is_refused(
    authored, edited, case, config, kind, where
):
    assert where in refused(kind, edited(authored[case].path, config)).where


def test_sparsegen_that_is_promised_and_not_saved_is_refused(authored, edited):
    path = authored["ldmole"].path
    tensors = torch.load(path / "adapter_model.bin", weights_only=True)
    gone = {name: None for name in tensors if "sparsegen" in name}
    assert "proj_layers" in refused(MissingTensorError, edited(path, tensors=gone)).where


def test_a_native_adapter_without_its_parameters_is_refused(authored, tmp_path):
    native.write(formats.read(authored["adamole"].path), tmp_path / "native")
    file = tmp_path / "native" / native.WEIGHTS
    tensors = load_file(file)
    name = f"{Q}.parameters"
    for value, kind in ((None, MissingTensorError), (torch.ones(2), ShapeError)):
        changed = {k: v for k, v in tensors.items() if k != name}
        save_file(changed if value is None else {**changed, name: value}, file)
        assert name in refused(kind, tmp_path / "native").where
