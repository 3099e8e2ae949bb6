"""No field of a config is passed over in silence: it is known, or named in a warning."""

import dataclasses
import json

import pytest
import torch
from support.broken import refusal
from support.cases import CASES
from support.inspecting import run as inspect

from molehill.engine import formats
from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.formats.readers import known

EVERY_FORMAT = [*CASES, "drlora"]
UNKNOWN = "fields that molehill does not know, served as if they were not there: "


def warnings(directory):
    """Less those of what two methods save nowhere."""
    assumed = ("top_k is not in", "GOAT saves no scaling")
    result = formats.read(directory).warnings
    return [text for text in result if not any(known in text for known in assumed)]


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_FORMAT)
@pytest.mark.parametrize("value", [True, False, 0, "quietly", {"on": True}], ids=str)
def test_an_unknown_field_is_named_with_its_value(edited, case, value):
    (warning,) = warnings(edited(case, {"scale_twice": value}))
    assert warning == f"adapter_config.json: {UNKNOWN}scale_twice = {value!r}"


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_FORMAT)
def test_an_unknown_field_that_is_not_set_is_not(golden, tmp_path, case):
    directory = tmp_path / "a"
    directory.mkdir()
    for file in (golden / "cases" / case).glob("adapter_model.*"):
        (directory / file.name).symlink_to(file)
    config = json.loads((golden / "cases" / case / "adapter_config.json").read_text())
    empty = {"a": None, "b": [], "c": {}, "d": ""}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **empty}))
    assert warnings(directory) == []


def test_other_formats_fields_are_unknown_here(edited):
    """`top_p` belongs to DynMoLE, not to MoLA."""
    (warning,) = warnings(edited("mola", {"top_p": 0.5}))
    assert warning.endswith("top_p = 0.5")


def test_fields_of_the_experts_own_lora(edited):
    config = {"r": 2, "lora_alpha": 6, "use_loha": True}
    (warning,) = warnings(edited("mixlora-expert-lora", {"expert_lora": config}))
    assert warning == f"adapter_config.json: expert_lora: {UNKNOWN}use_loha = True"


def test_many_and_odd_names_stay_one_line(edited):
    names = {f"field_{i:04d}\n\ud800{'x' * 200}": "y" * 500 for i in range(3000)}
    (warning,) = warnings(edited("lora", names))
    assert "\n" not in warning
    assert warning.endswith("and 2992 more")
    assert len(warning.encode()) < 2000


def test_inspect_shows_it(edited, capsys):
    directory = edited("lora", {"scale_twice": True})
    assert inspect(directory, "--json") == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "scale_twice = True" in warning
    assert inspect(directory) == 0
    assert "scale_twice = True" in capsys.readouterr().out


def test_every_field_of_peft_is_known():
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - set(known.FIELDS["lora"]) == set()


# What PEFT 0.18.1, 0.19.1, 0.20.0 and 0.21.2 write beside what each of them writes.
ADDED = {
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.20": {"velora_config": None, "monteclora_config": None},
    "0.21": {"kasa_config": None},
}


def test_the_defaults_of_peft_give_no_warning(golden, edited):
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    defaults = peft.LoraConfig(task_type="CAUSAL_LM").to_dict()
    defaults |= {name: value for more in ADDED.values() for name, value in more.items()}
    config = json.loads((golden / "cases" / "lora" / "adapter_config.json").read_text())
    assert warnings(edited("lora", {**defaults, **config, "peft_type": "LORA"})) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 0.3),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("eva_config", {"rho": 2.0}),
        ("init_lora_weights", "mica"),
        ("ensure_weight_tying", True),
        ("qalora_group_size", 32),
        ("merge_weights", True),
        ("merge_weights", False),
        ("enable_lora", None),
        ("revision", "main"),
    ],
)
def test_what_is_for_training_changes_nothing(golden, edited, field, value):
    adapter = formats.read(edited("lora", {field: value}))
    assert adapter.digest == formats.read(golden / "cases" / "lora").digest
    assert adapter.warnings == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", name) for name in ("pissa_niter_4", "olora", "corda", "loftq")),
        ("init_lora_weights", "lora_ga"),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("enable_lora", [True, False, True]),
    ],
)
def test_what_changes_an_answer_and_is_not_served_is_refused(edited, field, value):
    assert field in refusal(UnsupportedError, edited("lora", {field: value})).where


EMPTY = "but there are no tensors for it: no effect"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "loramoe-official", "mola", "dynmole-k1"])
@pytest.mark.parametrize("names", [["score"], ["lm_head", "embed_tokens"]], ids=str)
def test_modules_that_were_not_saved_are_a_warning(golden, edited, case, names):
    adapter = formats.read(edited(case, {"modules_to_save": names}))
    assert adapter.digest == formats.read(golden / "cases" / case).digest
    assert f"modules_to_save is {names}, {EMPTY}" in adapter.warnings


@pytest.mark.parametrize("case", ["lora", "loramoe-official"])
@pytest.mark.parametrize(
    ("names", "tensor"),
    [
        (["lm_head"], "base_model.model.lm_head.weight"),
        (["score", "embed_tokens"], "base_model.model.model.embed_tokens.weight"),
    ],
)
def test_modules_that_were_saved_are_refused(edited, case, names, tensor):
    directory = edited(case, {"modules_to_save": names}, {tensor: torch.ones(512, 64)})
    error = refusal(UnsupportedError, directory)
    assert error.where == "adapter_config.json: modules_to_save"
    assert error.found == f"whole modules ({names[-1]})"


@pytest.mark.parametrize("value", ["lm_head", [1], {"a": 1}])
def test_modules_to_save_of_the_wrong_type(edited, value):
    error = refusal(ConfigError, edited("lora", {"modules_to_save": value}))
    assert "modules_to_save" in error.where


def test_biases_that_were_not_saved_are_a_warning(edited):
    (warning,) = warnings(edited("lora", {"bias": "all"}))
    assert warning == "bias is 'all', but the file has none of the base's: no effect"
