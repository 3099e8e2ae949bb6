"""X-LoRA: the golden case, what PEFT makes and answers, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import xlora
from support.golden import TINY_LLAMA, Case, greatest_difference
from support.logits import logits_of

from molehill.api.cli import main
from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    LimitError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.validation import check
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.transform.merge import merge_static, subtract

LOGITS = 1e-3
ROUTING = 1e-5
CLASSIFIER = "base_model.internal_xlora_classifier.layers"
TOKENS = [303, 316, 288, 262, 352, 17, 40, 41, 42]


@pytest.fixture(scope="module")
def model():
    return xlora.base()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    pytest.importorskip("peft", reason="the dev extra is not installed")
    directory = tmp_path_factory.mktemp("xlora") / "experts"
    xlora.save_experts(directory)
    return directory


@pytest.fixture
def changed(tmp_path):
    """A copy of the golden case with other fields; None takes one out."""

    def change(directory=".", **config):
        target = tmp_path / "xlora"
        if not target.exists():
            shutil.copytree(Case("xlora").path, target)
        path = target / directory / "adapter_config.json"
        fields = json.loads(path.read_text()) | config
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        return target

    return change


def refusal(error, path):
    with pytest.raises(error) as caught:
        formats.read(path)
    return caught.value


def test_scalings_are_the_oracles(model):
    adapter, case = formats.read(Case("xlora").path), Case("xlora")
    ids = torch.tensor([case.prompts[0].ids])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
    expected = case.tensors["route.prompt0.xlora.scalings"]
    assert adapter.classifier is not None
    assert greatest_difference(adapter.classifier.gate_weights(hidden), expected) < ROUTING
    # As PEFT counts: q, v and down_proj of the first layer, then of the next.
    places = {site: mixture.place for site, mixture in adapter.sites.items()}
    assert [places[f"layers.0.{name}"] for name in ("self_attn.q_proj", "mlp.down_proj")] == [0, 2]
    assert places["layers.3.self_attn.v_proj"] == 10


# All of them are asked of an engine in tests/engine/test_activated.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["top 2 by softmax", "a first pass with experts"])
def test_what_peft_makes_gives_pefts_logits(model, experts, tmp_path, name):
    directory = tmp_path / "made"
    peft_model = xlora.make(experts, directory, **xlora.VARIANTS[name])
    expected = logits_of(peft_model, TOKENS)
    adapter = formats.read(directory)
    with attach(model, adapter):
        assert greatest_difference(logits_of(model, TOKENS), expected) < LOGITS
    # Neither without its adapter nor with even scalings is it that.
    assert greatest_difference(logits_of(model, TOKENS), expected) > 0.1
    latest = peft_model.base_model.internal_xlora_scalings[0]
    assert latest.std(0).max() > 0.01


def test_molehills_own_format_keeps_it(changed, tmp_path):
    config = {"enable_softmax_topk": True, "top_k_lora": 2, "softmax_temperature": 0.7}
    adapter = formats.read(changed(**config, global_scaling_weight=2.0))
    native.write(adapter, tmp_path / "native")
    again = native.read(tmp_path / "native", Limits())
    assert again.digest == adapter.digest
    assert again.classifier is not None
    assert again.classifier.to_json() == adapter.classifier.to_json()
    assert (again.classifier.top_k, again.classifier.temperature) == (2, 0.7)
    assert formats.read(changed(softmax_temperature=0.8)).digest != adapter.digest


@pytest.mark.slow
def test_the_tokens_with_scalings_of_their_own_are_the_adapters(changed, tmp_path, capsys):
    exact = formats.read(changed())
    assert "non_granular_after" not in exact.classifier.to_json()
    adapter = formats.read(changed(non_granular_after=3))
    assert adapter.classifier.non_granular_after == 3
    assert (
        len({exact.digest, adapter.digest, formats.read(changed(non_granular_after=0)).digest}) == 3
    )
    assert any("The first 4 tokens are PEFT's" in text for text in adapter.warnings)
    command = ["convert", "--non-granular-after", "3"]
    directory = changed(non_granular_after=None)
    assert main.main([*command, str(directory), str(tmp_path / "native")]) == 0
    assert formats.read(tmp_path / "native").digest == adapter.digest
    assert formats.read(tmp_path / "native").warnings == adapter.warnings
    capsys.readouterr()
    assert main.main(["inspect", str(tmp_path / "native")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "for the first 3 tokens of an answer, then kept" in shown
    assert "non_granular_after is 3" in shown
    for source, said in (
        (changed(non_granular_after=2), "2, as the"),
        (Case("lora").path, "is lora"),
    ):
        assert main.main([*command, str(source), str(tmp_path / "refused")]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", [3], 1e400, 1 << 31])
def test_a_number_of_tokens_that_is_none_is_refused(changed, value):
    error = refusal(ConfigError, changed(non_granular_after=value))
    assert error.where.endswith("non_granular_after")


def test_the_definition_of_kept_scalings(model):
    """One sequence with each token's gate weights taken as mistral.rs does: from a forward of the
    prompt, and then from one forward a token, of which the k-th's stay."""
    adapter = formats.read(Case("xlora").path)
    prompt, ids = 4, TOKENS
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    weights_of_all = adapter.classifier.gate_weights(hidden)
    for k in (0, 1, 3, 5, 6, 50):
        cached, steps = None, [weights_of_all[:prompt]]
        for index, weights in enumerate(weights_of_all[prompt:], 1):
            steps.append(weights[None] if cached is None else cached)
            if index == k:
                cached = steps[-1]
            if k == 0:
                # mistral.rs keeps a prompt's as they are, which fit no later token.
                cached = weights_of_all[prompt - 1 : prompt]
                steps[-1] = cached
        expected = torch.cat(steps)
        classifier = replace(adapter.classifier, non_granular_after=k)
        assert torch.equal(classifier.as_answered(weights_of_all, prompt), expected)
        with attach(model, replace(adapter, classifier=classifier), prompt=prompt):
            kept = logits_of(model, ids)
        with attach(model, adapter, prompt=prompt):
            exact = logits_of(model, ids)
        same = prompt + k
        assert torch.equal(kept[:same], exact[:same])
        if same < len(ids):
            assert greatest_difference(kept[same:], exact[same:]) > 1e-3
    assert torch.equal(adapter.classifier.as_answered(weights_of_all, prompt), weights_of_all)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layers": 10**12}, MissingTensorError),
        ({"layers": 1}, UnsupportedError),
        ({"more": 1}, UnsupportedError),
        ({"temperature": 0}, ConfigError),
    ],
)
def test_a_file_of_molehills_own_format_is_held_against_its_tensors(tmp_path, changes, error):
    native.write(formats.read(Case("xlora").path), tmp_path / "native")
    file = tmp_path / "native" / native.CONFIG
    document = json.loads(file.read_text())
    document["classifier"] |= changes
    file.write_text(json.dumps(document))
    assert "classifier" in refusal(error, tmp_path / "native").where


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"experts": 4}, ShapeError),
        ({"places": 11}, ShapeError),
        ({"layerwise": False}, ShapeError),
        ({"top_k": 5}, UnsupportedError),
        ({"places": 1 << 20}, LimitError),
    ],
)
def test_a_classifier_that_contradicts_its_adapter_is_refused(changes, error):
    adapter = formats.read(Case("xlora").path)
    assert adapter.classifier is not None
    classifier = replace(adapter.classifier, **changes)
    with pytest.raises(error):
        check(replace(adapter, classifier=classifier), Limits())
    with pytest.raises(UnsupportedError, match="one in the adapter"):
        check(replace(adapter, classifier=None), Limits())


def test_it_is_said_what_softmax_over_the_top_k_normalises(changed, capsys):
    directory = changed(enable_softmax_topk=True, top_k_lora=2)
    assert main.main(["inspect", str(directory), "--model", str(TINY_LLAMA)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the 2 greatest kept, normalised by softmax for each token" in shown
    assert "2793" in shown
    assert "--xlora" in shown


def test_experts_by_other_names_are_in_the_configs_order(changed):
    directory = changed()
    config = {"one": "somewhere/2", "1": "1", "three": "./0"}
    adapter = formats.read(changed(adapters=config))
    whole = formats.read(Case("xlora").path)
    site = "layers.0.self_attn.q_proj"
    assert adapter.sites[site].experts.ranks == (3, 4, 2)
    assert whole.sites[site].experts.ranks == (2, 4, 3)
    assert any("0, 1, 2 and so on" in text for text in adapter.warnings)
    shutil.rmtree(directory / "2")
    error = refusal(ConfigError, directory)
    assert "one, no directory" in error.found


@pytest.mark.parametrize(
    ("config", "error", "where"),
    [
        ({"adapters": {}}, ConfigError, "adapters"),
        ({"adapters": {"0": "./0", "zero": "./0", "1": "./1"}}, ConfigError, "adapters"),
        ({"adapters": {"..": ".."}}, UnsupportedError, "adapters"),
        ({"adapters": {"/etc": "/etc"}}, UnsupportedError, "adapters"),
        ({"hidden_size": 32}, ShapeError, "layers.0.weight"),
        ({"xlora_size": 16}, ShapeError, "layers.3.weight"),
        ({"xlora_depth": 3}, ShapeError, "the classifier"),
        ({"layerwise_scalings": False}, ShapeError, "layers.3.weight"),
        ({"top_k_lora": 4}, UnsupportedError, "top_k_lora"),
        ({"top_k_lora": 0}, ConfigError, "top_k_lora"),
        ({"top_k_lora": 1, "scaling_pass_value": 0.5}, UnsupportedError, "first_pass"),
        ({"softmax_temperature": 0}, ConfigError, "softmax_temperature"),
        ({"adapters": {"0": "./0", "1": "./1"}}, ShapeError, "layers.3.weight"),
    ],
)
def test_a_config_that_contradicts_its_files_is_refused(changed, config, error, where):
    assert where in refusal(error, changed(**config)).where


def test_an_experts_warnings_are_its_directorys(changed):
    # Without magnitudes it is a plain LoRA, as it is by itself.
    adapter = formats.read(changed("1", use_dora=True))
    assert any(text.startswith("1: use_dora is set") for text in adapter.warnings)


def test_an_expert_with_magnitudes_is_refused(changed):
    directory = changed("1", use_dora=True)
    file = directory / "1" / "adapter_model.safetensors"
    tensors = load_file(file)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    save_file({**tensors, **magnitudes}, file)
    error = refusal(UnsupportedError, directory)
    assert (error.where.startswith("1/"), error.found) == (True, "dora")


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "1/alora_invocation_tokens"),
        ({"peft_type": "MOLA"}, "1/"),
        ({"peft_type": "XLORA"}, "1/"),
    ],
)
def test_an_expert_that_is_no_plain_lora_is_refused(changed, config, where):
    directory = changed("1", **config)
    with pytest.raises((UnsupportedError, ConfigError, MissingTensorError)) as caught:
        formats.read(directory)
    assert caught.value.where.startswith(where)


def test_an_expert_on_the_embedding_is_refused(changed):
    directory = changed("1", target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    file = directory / "1" / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    pair = {f"{stem}_A": torch.ones(4, 512), f"{stem}_B": torch.ones(64, 4)}
    save_file({**tensors, **pair}, file)
    assert "embed_tokens" in refusal((UnsupportedError, ShapeError), directory).where


def test_scalings_by_linear_need_names_that_tell_their_order(changed):
    directory = changed()
    for i in range(3):
        changed(str(i), target_modules=["q_proj", "v_proj", "fc2"])
        file = directory / str(i) / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({k.replace("down_proj", "fc2"): v for k, v in tensors.items()}, file)
    error = refusal(UnsupportedError, directory)
    assert error.where == "layers.0.mlp.fc2"
    assert "number in PEFT" in error.found


def test_a_classifier_without_its_tensors_is_refused(changed):
    directory = changed()
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != f"{CLASSIFIER}.3.bias"}, file)
    assert refusal(MissingTensorError, directory).where.endswith(f"{CLASSIFIER}.3.bias")
    save_file({**tensors, "more": torch.ones(1, 1)}, file)
    assert refusal(UnsupportedError, directory).where.endswith("more")
    file.unlink()
    assert refusal(MissingTensorError, directory).found == "no weights"


def test_more_than_a_server_takes_is_refused(changed):
    with pytest.raises(LimitError):
        formats.read(changed(), Limits(experts=2))
    with pytest.raises(LimitError, match="all experts"):
        formats.read(changed(), Limits(adapter_bytes=60_000))


def test_it_is_merged_with_nothing():
    adapter = formats.read(Case("xlora").path)
    merged, sites = merge_static(adapter)
    assert merged is adapter
    assert sites == ()
    with pytest.raises(UnsupportedError, match="X-LoRA"):
        subtract(adapter, {})


def test_a_forward_with_a_cache_is_refused(model):
    with (
        attach(model, formats.read(Case("xlora").path)),
        pytest.raises(UnsupportedError, match="use_cache=False"),
    ):
        model(torch.tensor([TOKENS]), past_key_values=object())
