"""A file that holds tensors which its config takes out contradicts it. The rule is PEFT's own."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.logits import logits_of
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    LimitError,
    MissingTensorError,
    UnsupportedError,
)
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers.targeting import Targeting
from molehill.engine.hf.reference import attach

MODULES = [
    *(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1, 2, 11)
        for name in (
            "self_attn.q_proj",
            "self_attn.v_proj",
            "mlp.up_proj",
            "mlp.experts.1.up_proj",
            "mlp.shared.0.up_proj",
        )
    ),
    "layers.1.self_attn.q_proj",
    "model.layers.1.h.0.up_proj",
    "lm_head",
]
CONFIGS = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.11.mlp.up_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r".*\.layers\.11\..*(q_proj|v_proj)$"},
    {"target_modules": r"^(?!.*mlp).*(?:q_proj|up_proj).*"},
    {"target_modules": r"(?i).*\.LAYERS\.\d{2,}\.(?:\w+\.){1,2}\w+"},
    {"target_modules": r".*layers\.1{,2}\..*"},
    {"target_modules": r"(?:.*\.)?layers.(1|2).(?P<x>mlp|self_attn).*\b[qu]\w*"},
    {"target_modules": r"model\.layers\.[01]\..*up_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
    {"target_modules": ["up_proj", "model.layers.2.self_attn.q_proj"], "layers_to_transform": [0]},
    *(
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": p,
        }
        for p in ("layers", ["h", "layers"], "h", ["experts"], "", [], "l[a-z]+s", ["nowhere"])
    ),
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": r".*proj", "exclude_modules": r"model\.layers\.1.*"},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["shared.0", "lm_head"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_modules_are_adapted_as_by_peft(config):
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists

    ours, theirs = Targeting(Fields("c", config)), peft.LoraConfig(**config)
    result = [ours.against(module) is None for module in MODULES]
    assert result == [bool(check_target_module_exists(theirs, module)) for module in MODULES]
    assert True in result or "nowhere" in str(config)


def test_architectures_own_targets_are_not_in_the_file():
    for config in ({}, {"target_modules": None}, {"target_modules": "all-linear"}):
        assert {Targeting(Fields("c", config)).against(module) for module in MODULES} == {None}


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32).eval()


TOKENS = [303, 316, 288, 262, 352, 17, 5]


@pytest.fixture(scope="module")
def saved(golden, tmp_path_factory):
    """q and v of every layer, by PEFT."""
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    base = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    directory = tmp_path_factory.mktemp("saved")
    wrapped.save_pretrained(directory)
    return directory


def changed(saved, directory, keep=lambda name: True, **fields):
    directory.mkdir()
    config = json.loads((saved / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if keep(name)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


TAKEN_OUT = [
    ({"layers_to_transform": [0]}, lambda name: "layers.0." in name),
    ({"layers_to_transform": 2}, lambda name: "layers.2." in name),
    (
        {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
        lambda name: "layers.1." in name or "layers.3." in name,
    ),
    ({"exclude_modules": ["v_proj"]}, lambda name: "v_proj" not in name),
    ({"exclude_modules": ["layers.3.self_attn.v_proj"]}, lambda name: "3.self_attn.v" not in name),
    ({"exclude_modules": r".*layers\.[12]\..*"}, lambda name: "rs.0" in name or "rs.3" in name),
    ({"target_modules": ["q_proj"]}, lambda name: "q_proj" in name),
    ({"target_modules": r"model\.layers\.1\..*_proj"}, lambda name: "layers.1." in name),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "keep"), TAKEN_OUT, ids=[str(case[0]) for case in TAKEN_OUT])
def test_tensors_that_peft_drops_are_an_error_and_the_rest_is_pefts(
    golden, model, saved, tmp_path, fields, keep
):
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    contradicting = changed(saved, tmp_path / "a", **fields)
    error = refusal(UnsupportedError, contradicting)
    field, value = next(iter(fields.items()))
    assert error.where.startswith("adapter_model.safetensors: model.layers.")
    assert error.found == "tensors of an untargeted module"
    assert error.expected == f"none, as {field} is {value!r}"
    base = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, contradicting).eval()
    with attach(model, formats.read(changed(saved, tmp_path / "b", keep, **fields))):
        torch.testing.assert_close(
            logits_of(model, TOKENS), logits_of(theirs, TOKENS), rtol=0, atol=1e-4
        )


def test_a_lora_on_a_module_that_is_saved_whole(saved, tmp_path):
    error = refusal(UnsupportedError, changed(saved, tmp_path / "a", modules_to_save=["v_proj"]))
    assert error.expected == "none, as modules_to_save is ['v_proj']"


def test_forks_follow_the_same_rule(golden, edited):
    error = refusal(UnsupportedError, edited("loramoe-official", {"layers_to_transform": [0]}))
    assert error.expected == "none, as layers_to_transform is [0]"


def test_a_name_for_layers_that_none_has(saved, tmp_path):
    fields = {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "h"}
    error = refusal(UnsupportedError, changed(saved, tmp_path / "a", **fields))
    assert error.expected == "none, as layers_pattern is 'h'"


def test_tensors_that_are_missing_in_a_listed_layer(saved, tmp_path):
    lost = changed(
        saved,
        tmp_path / "a",
        lambda name: "layers.1.self_attn.q" in name or "layers.2." in name,
        layers_to_transform=[1, 2],
    )
    assert "layers.1.self_attn.v_proj" in refusal(MissingTensorError, lost).where


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"exclude_modules": 3}, "exclude_modules"),
        ({"exclude_modules": [3]}, "exclude_modules"),
        ({"exclude_modules": "("}, "exclude_modules"),
        ({"exclude_modules": "[[:alpha:]]"}, "exclude_modules"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern"),
        ({"layers_to_transform": [0], "layers_pattern": 5}, "layers_pattern"),
        ({"layers_to_transform": [0], "target_modules": ".*"}, "layers_to_transform"),
        ({"modules_to_save": ["("]}, "modules_to_save"),
    ],
)
def test_fields_of_the_wrong_type(saved, tmp_path, fields, where):
    error = refusal(ConfigError, changed(saved, tmp_path / "a", **fields))
    assert where in error.where


def test_a_pattern_that_would_take_for_ever_is_refused(saved, tmp_path, monkeypatch):
    """RE2 takes no lookaround, so that this one takes exponential time."""
    monkeypatch.setattr("molehill.engine.formats.readers.patterns._SECONDS", 0.2)
    pattern = "(?=.)" + ".*?" * 12 + "[?!]"
    error = refusal(LimitError, changed(saved, tmp_path / "a", exclude_modules=pattern))
    assert error.where == "adapter_config.json: exclude_modules"


def test_a_pattern_that_keeps_python_busy_for_ever_is_matched(saved, tmp_path):
    pattern = ".*?" * 30 + "[?!]"
    adapter = formats.read(changed(saved, tmp_path / "a", exclude_modules=pattern))
    assert len(adapter.sites) == 8


def test_a_long_pattern_is_refused(saved, tmp_path):
    long = "|".join(map("a{}".format, itertools.repeat("b" * 100, 500)))
    refusal(LimitError, changed(saved, tmp_path / "a", exclude_modules=long))


def test_a_pattern_for_layers_by_itself_is_a_warning(saved, tmp_path):
    (warning,) = formats.read(changed(saved, tmp_path / "a", layers_pattern="layers")).warnings
    assert warning.endswith("layers_pattern without layers_to_transform has no effect")
