"""Static mixes, Arrow routing and learned gates: adapters made of others, against PEFT's own, or
the definition."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.authored import SCALES, TASKS, save_lora, tiny_llama
from support.gated import GATED
from support.golden import greatest_difference

from molehill.api.cli import main
from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.formats.convert import isolation
from molehill.engine.hf.reference import attach
from molehill.engine.transform.arrow import prototype
from molehill.engine.transform.weighted_sum import Part, mix
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Arrow, Constant, Soft, TopK

LOGITS = 1e-3
SITE = "layers.0.self_attn.q_proj"
CONFIG = "adapter_config.json"
MADE = ("mix", "arrow", "arrow-general", "molora", "molora-by-token")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_the_reference_gives_the_oracles_logits_and_tokens(authored, model, name):
    with attach(model, formats.read(authored[name].path)):
        for prompt in authored[name].prompts:
            tokens = list(prompt.ids)
            for step in range(len(prompt.greedy)):
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                if step == 0:
                    assert greatest_difference(logits, prompt.logits) < LOGITS
                tokens.append(int(logits.argmax()))
            assert tuple(tokens[len(prompt.ids) :]) == prompt.greedy


@pytest.mark.parametrize("name", MADE)
def test_native_round_trip_keeps_the_digest(authored, tmp_path, name):
    adapter = formats.read(authored[name].path)
    native.write(adapter, tmp_path / "native")
    assert formats.read(tmp_path / "native").digest == adapter.digest
    assert native.read_stored(tmp_path / "native").digest == adapter.digest
    assert formats.read(authored[name].path).digest == adapter.digest


@pytest.mark.parametrize("name", MADE)
def test_inspect_shows_it(authored, golden, capsys, name):
    arguments = ["inspect", str(authored[name].path), "--model", str(golden / "tiny-llama")]
    assert main.main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["problems"]) == (name.partition("-")[0], [])
    assert {site["static"] for site in shown["sites"]} == {name == "mix"}


# Static mixes


def lora(scale=1.0, inputs=6, outputs=5, ranks=(2,), site=SITE, **more):
    a, b = torch.randn(sum(ranks), inputs), torch.randn(outputs, sum(ranks))
    mixture = LinearMixture(Experts(a, b, ranks), Constant((scale,) * len(ranks)), **more)
    return Adapter("lora", {site: mixture}, "base")


def delta(adapter, site=SITE):
    mixture = adapter.sites[site]
    weights = torch.tensor(mixture.policy.weights)[mixture.experts.expert_of_row]
    return (mixture.experts.b * weights) @ mixture.experts.a


def test_a_mix_is_the_weighted_sum_of_its_deltas():
    first, second = lora(), lora(ranks=(1, 3), scale=0.5)
    other = lora(site="layers.1.mlp.up_proj")
    mixed = mix([Part("a", first, 0.5), Part("b", second, -2.0), Part("c", other, 3.0)])
    assert mixed.sites[SITE].experts.ranks == (2, 1, 3)
    assert (mixed.kind, mixed.base_model, mixed.warnings) == ("mix", "base", ())
    torch.testing.assert_close(delta(mixed), 0.5 * delta(first) - 2 * delta(second))
    single = delta(mixed, "layers.1.mlp.up_proj")
    torch.testing.assert_close(single, 3 * delta(other, "layers.1.mlp.up_proj"))


def test_a_mix_of_mixes_is_a_mix():
    first, second = lora(), lora()
    inner = mix([Part("a", first, 2.0), Part("b", second, 1.0)])
    outer = mix([Part("inner", inner, -1.0), Part("a", first, 2.0)])
    torch.testing.assert_close(delta(outer), -delta(second))


def test_a_mix_keeps_the_warnings_of_its_parts_and_the_base_that_they_agree_on():
    one = Adapter("lora", lora().sites, "base", ("odd",))
    other = Adapter("lora", lora().sites, "another base")
    mixed = mix([Part("a", one, 1.0), Part("b", other, 1.0)])
    assert (mixed.warnings, mixed.base_model) == (("a: odd",), None)


def test_a_mix_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no adapters"):
        mix([])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dora", "a DoRA magnitude"),
        ("mola", r"reads the token \(TopK\)"),
        ("dynmole-k1", r"reads the token \(DynMoLE\)"),
        ("mixlora", "a mixture of whole FFNs"),
    ],
)
def test_what_is_no_lora_is_refused_by_name_with_the_reason(golden, case, reason):
    adapter = formats.read(golden / "cases" / case)
    with pytest.raises(UnsupportedError, match=rf"^bad: layers\.\d.*{reason}"):
        mix([Part("good", lora(), 1.0), Part("bad", adapter, 1.0)])


@pytest.mark.parametrize(("shape", "half"), [({"inputs": 7}, "a"), ({"outputs": 7}, "b")])
def test_parts_of_other_widths_are_refused_by_name(shape, half):
    with pytest.raises(ShapeError, match=rf"^wide: {SITE}\.{half}: found width 7"):
        mix([Part("first", lora(), 1.0), Part("wide", lora(**shape), 1.0)])


@pytest.mark.slow
def test_a_mix_by_file_takes_adapters_of_any_format(golden, tmp_path):
    lora_case = formats.read(golden / "cases" / "lora")
    native.write(lora_case, tmp_path / "native")
    shutil.copytree(golden / "cases" / "rslora", tmp_path / "pickled")
    write(tmp_path, {"kind": "mix", "adapters": {"native": 2, "pickled": -0.5}})
    adapter = formats.read(tmp_path)
    expected = 2 * delta(lora_case) - 0.5 * delta(formats.read(golden / "cases" / "rslora"))
    torch.testing.assert_close(delta(adapter), expected)
    assert isolation.is_pickled(tmp_path)
    assert isolation.read_isolated(tmp_path).digest == adapter.digest


def write(directory, document):
    (directory / "molehill_mix.json").write_text(json.dumps(document))


# Arrow


def test_prototypes_are_the_first_right_singular_vectors():
    a, b = torch.randn(3, 20), torch.randn(30, 3)
    expected = torch.linalg.svd((b @ a).double()).Vh[0].float()
    result = prototype(a, b)
    assert torch.allclose(result, expected, atol=1e-5) or torch.allclose(
        result, -expected, atol=1e-5
    )
    assert result[result.abs().argmax()] > 0
    wide = prototype(torch.randn(6, 4), torch.randn(9, 6))
    assert wide.norm() == pytest.approx(1, abs=1e-6)


def test_the_prototype_of_nothing_is_nothing():
    """PEFT's iteration gives that too; a singular vector of zeros would be a random direction."""
    assert not prototype(torch.randn(3, 20), torch.zeros(30, 3)).any()


def test_arrow_is_a_mixture_of_the_tasks(authored):
    adapter = formats.read(authored["arrow"].path)
    assert adapter.kind == "arrow"
    assert {mixture.policy for mixture in adapter.sites.values()} == {Arrow(2, 0.8)}
    site, path = adapter.sites[SITE], authored["arrow"].path
    assert site.experts.ranks == (3, 3, 3)
    for e, (task, (a, b)) in enumerate(zip(TASKS, site.experts.split(), strict=True)):
        site_experts = formats.read(path / task).sites[SITE].experts
        assert torch.equal(a, site_experts.a)
        assert torch.equal(b, site_experts.b)
        assert torch.equal(site.router[e], prototype(a, b))


def test_arrow_has_pefts_defaults(copied):
    directory = copied("arrow", {"top_k": None, "router_temperature": None, "general": None})
    assert formats.read(directory).sites[SITE].policy == Arrow(3, 1.0)


def test_subtracting_general_knowledge_needs_equal_ranks(copied):
    directory = copied("arrow-general")
    shutil.rmtree(directory / "french")
    save_lora(directory / "french", 5, r=2)
    with pytest.raises(ShapeError, match=r"french: layers.*found rank 2, expected .* 3"):
        formats.read(directory)


def test_tasks_of_unequal_rank_need_no_padding(copied):
    directory = copied("arrow")
    shutil.rmtree(directory / "letters")
    save_lora(directory / "letters", 5, r=2)
    assert formats.read(directory).sites[SITE].experts.ranks == (3, 3, 2)


def test_tasks_that_adapt_other_linears_are_refused_by_name(copied):
    directory = copied("arrow")
    shutil.rmtree(directory / "letters")
    save_lora(directory / "letters", 5, target_modules=["q_proj"])
    with pytest.raises(UnknownTargetError, match=r"^letters: layers\.0\.mlp\.down_proj"):
        formats.read(directory)


@pytest.mark.parametrize("case", ["mola", "dora"])
def test_arrow_is_for_loras_by_peft(copied, golden, case):
    directory = copied("arrow", {"adapters": ["poems", "bad"]})
    shutil.copytree(golden / "cases" / case, directory / "bad")
    with pytest.raises((UnsupportedError, UnknownTargetError), match=r"^bad"):
        formats.read(directory)


# A learned gate


def edit_routers(directory, change):
    file = directory / "gate.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_learned_gate_takes_what_every_adapter_adapts(authored):
    """Of unequal ranks, on unequal linears; one that leaves a linear as it is adds nothing."""
    adapter, path = formats.read(authored["molora"].path), authored["molora"].path
    loras = [formats.read(path / name) for name in GATED]
    assert adapter.sites.keys() == {site for lora in loras for site in lora.sites}
    assert {mixture.policy for mixture in adapter.sites.values()} == {TopK(2)}
    for site, mixture in adapter.sites.items():
        for lora, (a, b) in zip(loras, mixture.experts.split(), strict=True):
            if site in lora.sites:
                site_experts = lora.sites[site].experts
                assert torch.equal(a, site_experts.a)
                assert torch.equal(b, site_experts.b)
            else:
                assert not b.any()


def test_a_learned_gate_takes_no_biases(copied):
    directory = copied("molora")
    file, config = (directory / "code" / name for name in ("adapter_model.safetensors", CONFIG))
    tensors = load_file(file)
    halves = {name: b for name, b in tensors.items() if name.endswith("lora_B.weight")}
    biases = {name.replace(".weight", ".bias"): torch.ones(len(b)) for name, b in halves.items()}
    save_file({**tensors, **biases}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_bias": True}))
    with pytest.raises(UnsupportedError, match=r"code: layers.*: found rows or a bias"):
        formats.read(directory)


def test_without_top_k_every_adapter_acts_and_the_temperature_divides(copied, authored):
    result = formats.read(copied("molora", {"top_k": None, "router_temperature": 2}))
    whole = formats.read(authored["molora"].path)
    for site, mixture in result.sites.items():
        assert mixture.policy == Soft()
        assert torch.equal(mixture.router, whole.sites[site].router / 2)


@pytest.mark.parametrize("case", ["mola", "dora"])
def test_a_learned_gate_is_for_loras(copied, golden, case):
    directory = copied("molora", {"adapters": ["poems", "code", "bad"]})
    shutil.copytree(golden / "cases" / case, directory / "bad")
    with pytest.raises(UnsupportedError, match=r"^bad: layers"):
        formats.read(directory)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (
            lambda tensors: tensors.pop("layers.2.mlp.down_proj.router"),
            ShapeError,
            r"gate.safetensors: router: found \[3, 64\], expected \[3, 176\], .* layers.2.mlp.down",
        ),
        (
            lambda tensors: tensors.pop("router"),
            MissingTensorError,
            r"gate.safetensors: layers\.\d\.self_attn\.._proj\.router: found no such tensor",
        ),
        (
            lambda tensors: tensors.update({"layers.9.mlp.down_proj.router": torch.ones(3, 176)}),
            UnsupportedError,
            r"layers.9.mlp.down_proj.router: found a tensor that routes nothing",
        ),
        (lambda t: t.update(router=torch.ones(64)), ShapeError, r"router: found \[64\]"),
        (lambda t: t.update(router=torch.full((3, 64), torch.nan)), NonFiniteError, "router"),
        (lambda t: t.update(router=torch.ones(3, 64).int()), UnsupportedError, "torch.int32"),
    ],
)
def test_bad_routers_are_refused_by_tensor(copied, change, kind, match):
    directory = copied("molora")
    edit_routers(directory, change)
    with pytest.raises(kind, match=match):
        formats.read(directory)


def test_a_router_file_that_is_a_link_or_cut_is_refused(copied):
    directory = copied("molora", {"router": "linked.safetensors"})
    (directory / "linked.safetensors").symlink_to(directory / "gate.safetensors")
    with pytest.raises(UnsupportedError, match=r"linked\.safetensors, a link"):
        formats.read(directory)
    (directory / "linked.safetensors").unlink()
    (directory / "linked.safetensors").write_bytes(b"cut")
    with pytest.raises(CorruptFileError, match=r"linked\.safetensors"):
        formats.read(directory)


# The file


OUTSIDE = ["..", ".", "", "/etc", "../other", "a/b", "a\\b", "a\0b", "\ud800", "a" * 200, 3, None]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_adapters_outside_the_directory_are_refused(copied, name):
    with pytest.raises(UnsupportedError, match=r"adapters: found .* expected a directory beside"):
        formats.read(copied("arrow", {"adapters": ["poems", name]}))


def test_a_link_is_refused(copied, golden):
    directory = copied("mix", {"adapters": {"formal": 1, "linked": 1}})
    (directory / "linked").symlink_to(golden / "cases" / "lora")
    with pytest.raises(UnsupportedError, match="linked, a link"):
        formats.read(directory)


def test_a_mix_inside_a_mix_is_refused(copied):
    directory = copied("mix")
    write(directory / "german", {"kind": "mix", "adapters": {"x": 1}})
    with pytest.raises(UnsupportedError, match=r"^german/molehill_mix\.json: found a mix inside"):
        formats.read(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "document", "kind", "match"),
    [
        (
            "mix",
            {"kind": "sum"},
            ConfigError,
            "found 'sum', expected one of mix, arrow, molora",
        ),
        ("mix", {"kind": None}, ConfigError, "kind"),
        ("mix", {"top_k": 2}, UnsupportedError, "top_k: found an unknown field"),
        ("mix", {"adapters": {}}, ConfigError, "adapters: found {}, expected at least one"),
        ("mix", {"adapters": ["formal"]}, ConfigError, "adapters: .*expected an object"),
        ("mix", {"adapters": {"formal": "1"}}, ConfigError, "adapters: formal: found '1'"),
        ("mix", {"adapters": {"formal": float("inf")}}, ConfigError, "adapters: formal"),
        ("mix", {"adapters": {"none": 1}}, ConfigError, "adapters: found none, no dir"),
        ("mix", {"adapters": {"formal": 0, "german": 0}}, NothingBoundError, "no effect"),
        ("mix", {"adapters": {"formal": 1e39}}, NonFiniteError, "NaN or Inf"),
        ("arrow", {"adapters": {"poems": 1}}, ConfigError, "adapters: .*expected a list"),
        ("arrow", {"adapters": ["poems", "poems"]}, ConfigError, "every adapter once"),
        ("arrow", {"adapters": []}, ConfigError, "at least one"),
        ("arrow", {"top_k": 4}, UnsupportedError, "top_k: found 4, expected at most 3"),
        ("arrow", {"top_k": 0}, ConfigError, "top_k"),
        ("arrow", {"router_temperature": 0}, ConfigError, "router_temperature"),
        ("arrow", {"general": ["nobody"]}, ConfigError, "general: found nobody, no"),
        ("arrow", {"scales": [1]}, UnsupportedError, "scales: found an unknown field"),
        ("molora", {"adapters": {"poems": 1}}, ConfigError, "adapters: .*expected a list"),
        ("molora", {"adapters": ["poems", "poems"]}, ConfigError, "every adapter once"),
        ("molora", {"top_k": 4}, UnsupportedError, "top_k: found 4, expected at most 3"),
        ("molora", {"normalize": 1}, ConfigError, "normalize: found 1"),
        ("molora", {"top_k": None, "normalize": True}, ConfigError, "none without `top_k`"),
        ("molora", {"router_temperature": -1}, ConfigError, "router_temperature"),
        ("molora", {"router": None}, ConfigError, "router: found nothing, expected a .safetensors"),
        ("molora", {"router": "other.safetensors"}, ConfigError, "other.safetensors, no file"),
        ("molora", {"router": "../gate.safetensors"}, UnsupportedError, "router: found '../gate"),
        ("molora", {"router": "gate.bin"}, UnsupportedError, "router: found 'gate.bin'"),
        ("molora", {"general": ["poems"]}, UnsupportedError, "general: found an unknown field"),
        ("molora", {"adapters": ["code", "poems"]}, ShapeError, r"router: found \[3, "),
    ],
)
def test_a_bad_file_is_refused_by_field(copied, name, document, kind, match):
    with pytest.raises(kind, match=match):
        formats.read(copied(name, document))


def test_an_error_in_a_part_names_the_part_and_its_file(copied):
    directory = copied("mix")
    (directory / "german" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CorruptFileError, match=r"^german/adapter_model\.safetensors: "):
        formats.read(directory)


def test_limits_are_for_the_whole(authored):
    path = authored["mix"].path
    sizes = [formats.read(path / name).num_bytes for name in SCALES]
    with pytest.raises(LimitError, match=r"^german: found \d+ bytes up to here"):
        formats.read(path, Limits(adapter_bytes=sum(sizes) - 1))
    with pytest.raises(LimitError, match="adapters: found 2 adapters, expected at most 1"):
        formats.read(path, Limits(experts=1))


@pytest.mark.parametrize(("place", "name"), [(1, "mix"), (2, "arrow-general"), (3, "molora")])
def test_the_documents_examples_are_what_is_read_here(authored, place, name):
    document = Path(__file__).parents[5] / "docs" / "format.md"
    blocks = re.findall(r"```json\n(.*?)```", document.read_text(), re.DOTALL)
    written = json.loads((authored[name].path / "molehill_mix.json").read_text())
    assert json.loads(blocks[place]) == written


# X-LoRA


def test_x_lora_is_refused_with_what_serving_it_would_take(golden):
    with pytest.raises(UnsupportedError) as caught:
        formats.read(golden / "cases" / "xlora")
    assert caught.value.where == "adapter_config.json: peft_type"
    assert "XLORA" in caught.value.found
    assert "twice, first without adapters and with a KV cache of its own" in caught.value.found
