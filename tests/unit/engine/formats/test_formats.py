"""What the readers make of well-formed adapters: canonical values worked out from the files."""

import json

import pytest
import torch
from support.cases import CASES

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.kernels.mixture import FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK


def raw(golden, case):
    return torch.load(golden / "cases" / case / "adapter_model.bin", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kind_sites_and_policy(golden, case):
    adapter = formats.read(golden / "cases" / case)
    kind, sites, policy = CASES[case]
    assert (adapter.kind, len(adapter.sites), adapter.base_model) == (kind, sites, "tiny-llama")
    policies = {mixture.policy for mixture in adapter.sites.values()}
    assert policies | {Constant((1.0,))} == {policy, Constant((1.0,))}
    assert policy in policies
    # Neither saves all that decides its answers.
    assert len(adapter.warnings) == (case in ("mola-official", "goat-lora"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_native_round_trip_keeps_the_digest(golden, tmp_path, case):
    adapter = formats.read(golden / "cases" / case)
    native.write(adapter, tmp_path / "store" / adapter.digest)
    again = formats.read(tmp_path / "store" / adapter.digest)
    assert again.digest == adapter.digest
    assert (again.kind, again.base_model) == (adapter.kind, adapter.base_model)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [adapter.digest]


@pytest.mark.slow
def test_digests_differ(golden):
    digests = {formats.read(golden / "cases" / case).digest for case in CASES}
    assert len(digests) == len(CASES)


def test_lora_scaling_is_folded_into_b(golden):
    tensors = raw(golden, "lora")
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    site = formats.read(golden / "cases" / "lora").sites["layers.1.mlp.up_proj"]
    assert isinstance(site, LinearMixture)
    assert site.router is None
    assert torch.equal(site.experts.a, tensors[f"{stem}.lora_A.weight"].float())
    assert torch.equal(site.experts.b, tensors[f"{stem}.lora_B.weight"].float() * 2)


def test_rslora_scales_by_the_root_of_the_rank(golden):
    tensors = raw(golden, "rslora")
    site = formats.read(golden / "cases" / "rslora").sites["layers.0.self_attn.q_proj"]
    expected = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].float() * 3
    assert torch.equal(site.experts.b, expected)


def test_experts_are_stacked_in_order(golden):
    tensors = raw(golden, "dynmole-k1")
    stem = "dynmole.layers.2.mlp.up_proj"
    site = formats.read(golden / "cases" / "dynmole-k1").sites["layers.2.mlp.up_proj"]
    assert site.experts.ranks == (2, 2, 2, 2)
    for e, (a, b) in enumerate(site.experts.split()):
        assert torch.equal(a, tensors[f"{stem}.experts.{e}.lora_A.weight"].float())
        assert torch.equal(b, tensors[f"{stem}.experts.{e}.lora_B.weight"].float() * 2)
    assert torch.equal(site.router, tensors[f"{stem}.moe_gate.weight"].float())


def test_expert_lora_scales_the_experts_only(golden):
    tensors = raw(golden, "mixlora-expert-lora")
    sites = formats.read(golden / "cases" / "mixlora-expert-lora").sites
    ffn = sites["layers.0.mlp"]
    assert isinstance(ffn, FfnMixture)
    assert (set(ffn.experts), ffn.activation) == ({"gate_proj", "up_proj"}, "silu")
    expert = tensors["mixlora.layers.0.mlp.up_proj.experts.3.lora_B.weight"].float() * 3
    assert torch.equal(ffn.experts["up_proj"].split()[3][1], expert)
    plain = tensors["mixlora.layers.0.self_attn.q_proj.lora_B.weight"].float() * 2
    assert torch.equal(sites["layers.0.self_attn.q_proj"].experts.b, plain)


def test_loramoe_attention_is_plain_lora(golden):
    sites = formats.read(golden / "cases" / "loramoe").sites
    assert sites["layers.0.self_attn.q_proj"].policy == Constant((1.0,))
    assert sites["layers.0.mlp.up_proj"].policy == Soft()


def test_safetensors_and_pickle_give_the_same_adapter(golden, edited):
    adapter = formats.read(edited("dynmole-k1", safetensors=True))
    assert adapter.digest == formats.read(golden / "cases" / "dynmole-k1").digest


def test_safetensors_is_preferred(golden, edited):
    directory = edited("lora", safetensors=True)
    (directory / "adapter_model.bin").write_bytes(b"not read")
    assert formats.read(directory).digest == formats.read(golden / "cases" / "lora").digest


def test_older_dynmole_files_have_no_entropy_type(edited):
    adapter = formats.read(edited("dynmole-k1", {"entropy_type": None}))
    policy = adapter.sites["layers.0.mlp.up_proj"].policy
    assert isinstance(policy, DynMoLE)
    assert policy.entropy_type == "tsallis"


def test_dynmole_readings_of_the_paper_are_options(edited):
    options = {"normalize_weights": True, "include_crossing": True, "normalize_entropy": False}
    policy = formats.read(edited("dynmole-k1", options)).sites["layers.0.mlp.up_proj"].policy
    assert policy == DynMoLE(
        0.95,
        1,
        0.85,
        normalize_weights=True,
        include_crossing=True,
        normalize_entropy=False,
    )


def test_the_officials_mola_differs_by_layer(golden):
    sites = formats.read(golden / "cases" / "mola-official").sites
    tensors = raw(golden, "mola-official")
    for layer, (experts, rank) in enumerate([(2, 2), (3, 3), (4, 4), (5, 2)]):
        site = sites[f"layers.{layer}.mlp.down_proj"]
        assert site.experts.ranks == (rank,) * experts
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        assert torch.equal(site.router, tensors[f"{stem}.router.router.weight"].float())
        for e, (a, b) in enumerate(site.experts.split()):
            assert torch.equal(a, tensors[f"{stem}.lora_A_{e}.weight"].float())
            expected = tensors[f"{stem}.lora_B_{e}.weight"].float() * 8 / rank
            torch.testing.assert_close(b, expected, rtol=1e-6, atol=0)


def test_the_officials_mola_says_that_its_top_k_is_assumed(golden, edited):
    (warning,) = formats.read(golden / "cases" / "mola-official").warnings
    assert warning.startswith("top_k is not in adapter_config.json: 2 is assumed")
    assert formats.read(edited("mola-official", {"top_k": 2})).warnings == ()


@pytest.mark.parametrize(("top_k", "expected"), [(1, [1, 1, 1, 1]), ([1, 2, 3, 4], [1, 2, 3, 4])])
def test_the_officials_mola_takes_top_k_from_the_config(edited, top_k, expected):
    sites = formats.read(edited("mola-official", {"top_k": top_k})).sites
    result = [sites[f"layers.{layer}.self_attn.q_proj"].policy for layer in range(4)]
    assert result == [TopK(k) for k in expected]


def test_hydralora_repeats_its_shared_a(golden):
    tensors = raw(golden, "hydralora")
    stem = "base_model.model.model.layers.2.mlp.down_proj"
    site = formats.read(golden / "cases" / "hydralora").sites["layers.2.mlp.down_proj"]
    assert site.experts.ranks == (4, 4, 4)
    for e, (a, b) in enumerate(site.experts.split()):
        assert torch.equal(a, tensors[f"{stem}.lora_A.weight"].float())
        assert torch.equal(b, tensors[f"{stem}.lora_B{e}.weight"].float() * 2)


@pytest.mark.parametrize("case", ["loramoe-official", "hydralora"])
def test_the_forks_are_told_by_their_tensors_whatever_the_config_says(golden, edited, case):
    adapter = formats.read(edited(case, {"lora_nums": None}))
    assert adapter.digest == formats.read(golden / "cases" / case).digest


@pytest.mark.parametrize("case", ["mola", "loramoe", "dynmole-k1", "mixlora"])
def test_the_method_may_be_named_by_its_strategy_alone(golden, edited, case):
    adapter = formats.read(edited(case, {"peft_type": None}))
    assert adapter.digest == formats.read(golden / "cases" / case).digest


def test_top_k_above_the_number_of_experts_means_all(edited):
    site = formats.read(edited("mola", {"top_k": 99})).sites["layers.0.mlp.down_proj"]
    uniform = torch.full((1, 4), 0.25)
    assert torch.equal(site.policy.route(uniform).weights, uniform)


def test_target_modules_may_say_which(golden, edited):
    targets = {"v_proj": True, "up_proj": True, "q_proj": False}
    adapter = formats.read(edited("dynmole-k1", {"target_modules": targets}))
    assert adapter.digest == formats.read(golden / "cases" / "dynmole-k1").digest


def test_a_target_without_tensors_is_a_warning(edited):
    adapter = formats.read(edited("lora", {"target_modules": [*LINEARS, "w1"]}))
    assert adapter.warnings == ("target_modules names w1, but there are no tensors for it",)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("case", ["lora", "mixlora", "loramoe"])
def test_dora_without_magnitudes_is_lora_and_a_warning(golden, edited, case):
    adapter = formats.read(edited(case, {"use_dora": True}))
    assert adapter.digest == formats.read(golden / "cases" / case).digest
    assert "no magnitudes are saved" in adapter.warnings[0]


def test_magnitudes_may_end_in_weight(golden, edited):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    original = formats.read(golden / "cases" / "dora")
    magnitude = original.sites["layers.0.self_attn.q_proj"].magnitude
    adapter = formats.read(edited("dora", tensors={name: None, f"{name}.weight": magnitude}))
    assert adapter.digest == original.digest


def test_the_base_prefix_may_lack_model(golden, edited):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    other = name.replace("lora_A", "lora_B")
    tensors = raw(golden, "lora")
    moved = {
        key.replace("model.model.layers", "model.layers"): tensors[key] for key in (name, other)
    }
    adapter = formats.read(edited("lora", tensors={name: None, other: None, **moved}))
    assert adapter.digest == formats.read(golden / "cases" / "lora").digest


def test_mixlora_gates_without_experts_are_a_warning(golden, edited):
    experts = {name: None for name in raw(golden, "mixlora-switch") if ".experts." in name}
    config = {"target_modules": ["v_proj"]}
    adapter = formats.read(edited("mixlora-switch", config, experts))
    assert set(adapter.sites) == {f"layers.{i}.self_attn.v_proj" for i in range(4)}
    assert "gates without experts" in adapter.warnings[0]


def test_writing_over_an_adapter_is_refused_and_leaves_no_trace(golden, tmp_path):
    adapter = formats.read(golden / "cases" / "lora")
    native.write(adapter, tmp_path / "a")
    with pytest.raises(FileExistsError):
        native.write(adapter, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_native_keeps_warnings(edited, tmp_path):
    adapter = formats.read(edited("lora", {"use_dora": True}))
    native.write(adapter, tmp_path / "a")
    assert formats.read(tmp_path / "a").warnings == adapter.warnings


@pytest.fixture
def stored(golden, tmp_path):
    adapter = formats.read(golden / "cases" / "mola")
    native.write(adapter, tmp_path / "a")
    return tmp_path / "a"


def rewrite(directory, change):
    document = json.loads((directory / "molehill.json").read_text())
    change(document)
    (directory / "molehill.json").write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        (lambda d: d.update(digest="0" * 64), CorruptFileError, "molehill.safetensors"),
        (lambda d: d.update(format_version=2), UnsupportedError, "format_version"),
        (lambda d: d.update(kind="lora"), CorruptFileError, "digest"),
        (lambda d: d["sites"].popitem(), UnsupportedError, "unknown tensor"),
        (lambda d: site(d).update(ranks=[2, 2]), ShapeError, r"down_proj\.a"),
        (lambda d: site(d).update(ranks="2"), ConfigError, "ranks"),
        (lambda d: site(d)["routing"].update(policy="Best"), ConfigError, "policy"),
        (lambda d: site(d)["routing"].update(k=0), ConfigError, "k"),
        (lambda d: site(d)["routing"].pop("normalize"), ConfigError, "routing"),
        (lambda d: site(d)["routing"].update(k=1), CorruptFileError, "digest"),
    ],
)
def test_a_changed_native_file_is_refused(stored, change, error, where):
    rewrite(stored, change)
    with pytest.raises(error, match=where):
        formats.read(stored)


def site(document):
    return document["sites"]["layers.0.mlp.down_proj"]


def test_a_changed_native_tensor_is_refused(stored):
    data = bytearray((stored / "molehill.safetensors").read_bytes())
    data[-2] ^= 1
    (stored / "molehill.safetensors").write_bytes(data)
    with pytest.raises(CorruptFileError, match="digest"):
        formats.read(stored)
