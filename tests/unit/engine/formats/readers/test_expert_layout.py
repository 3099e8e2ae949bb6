"""Whose the columns of lora_B are on fused experts: as PEFT has them, and as Unsloth had them.

The oracle is PEFT, on the model that the adapter was made on.
"""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.fused_experts import FUSED, TOKENS, check_oracle, logits_of, save_peft
from support.golden import Case
from transformers import AutoModelForCausalLM

from molehill.api.cli import convert, inspect, merge
from molehill.engine import formats
from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.formats import native
from molehill.engine.formats.convert import isolation
from molehill.engine.hf.reference import attach

LOGITS = 1e-4
EXPERTS = 4
BOTH = FUSED["both"]["target_parameters"]
ONE_BY_ONE = "unsloth_fused_expert_lora"


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-moe", dtype=torch.float32).eval()


class Saved:
    """An adapter of PEFT's on attention and experts; logits: PEFT's, of TOKENS."""

    def __init__(self, model, directory, **config):
        self.directory = directory
        config = {"target_modules": ["q_proj"], "target_parameters": BOTH, **config}
        self.logits = save_peft(model, directory, **config)

    def edit(self, **fields):
        path = self.directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def group(self, *parts):
        """The columns of lora_B on the experts, those of one expert side by side; parts: ends of
        the modules' names, all for none."""
        path = self.directory / "adapter_model.safetensors"
        tensors = load_file(path)
        for name, b in tensors.items():
            if ".experts." in name and name.endswith(parts or "lora_B.weight") and "lora_B" in name:
                by_rank = b.view(b.shape[0], -1, EXPERTS)
                tensors[name] = by_rank.transpose(1, 2).reshape(b.shape).contiguous()
        save_file(tensors, path)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    return Saved(model, tmp_path_factory.mktemp("made") / "adapter")


@pytest.fixture
def saved(made, tmp_path):
    """A copy, to be changed."""
    copy = object.__new__(Saved)
    copy.directory, copy.logits = tmp_path / "adapter", made.logits
    shutil.copytree(made.directory, copy.directory)
    return copy


def check_pefts(model, adapter, logits):
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), logits, rtol=0, atol=LOGITS)


def test_experts_grouped_as_the_config_says_give_pefts_logits(model, saved):
    digest = formats.read(saved.directory).digest
    saved.group()
    mixed_up = formats.read(saved.directory)
    saved.edit(lora_B_layout="grouped_by_expert")
    adapter = formats.read(saved.directory)
    # The digest is that of what is served.
    assert adapter.digest == digest != mixed_up.digest
    assert adapter.warnings == ()
    check_pefts(model, adapter, saved.logits)
    with attach(model, mixed_up):
        assert (logits_of(model, TOKENS) - saved.logits).abs().max() > 0.5


def test_unequal_ranks_are_grouped_each_by_its_own(model, tmp_path):
    ranks = {"rank_pattern": {r".*\.gate_up_proj": 6}, "use_rslora": True}
    saved = Saved(model, tmp_path / "adapter", **ranks)
    saved.group()
    saved.edit(lora_B_layout="grouped_by_expert")
    check_pefts(model, formats.read(saved.directory), saved.logits)


@pytest.mark.slow
def test_the_golden_case_of_unsloth(model):
    case = Case("experts-unsloth-grouped")
    with attach(model, formats.read(case.path)):
        check_oracle(model, case)


def test_rank_major_is_pefts_order(saved):
    digest = formats.read(saved.directory).digest
    saved.edit(lora_B_layout="rank_major", base_model_name_or_path="unsloth/tiny-moe")
    assert formats.read(saved.directory).digest == digest


def test_each_parameter_may_say_its_own(model, saved):
    """What Unsloth writes beside `lora_B_layout`, or in its place where parameters differ."""
    saved.group("experts.lora_B.weight")
    tensors = load_file(saved.directory / "adapter_model.safetensors")
    outer = tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
    grouped = "down_proj" if outer.shape[0] == 64 else "gate_up_proj"
    layouts: dict[str, dict[str, object]] = {
        name: {"lora_B_layout": "rank_major"} for name in ("gate_up_proj", "down_proj")
    }
    layouts[grouped] = {"lora_B_layout": "grouped_by_expert", "num_experts": EXPERTS}
    saved.edit(
        auto_mapping={"unsloth_fixed": True},
        **{ONE_BY_ONE: {"lora_A_layout": "grouped_by_expert", "parameters": layouts}},
    )
    adapter = formats.read(saved.directory)
    assert adapter.warnings == ()
    check_pefts(model, adapter, saved.logits)


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({"lora_B_layout": "by_row"}, "lora_B_layout", "'by_row'"),
        ({"lora_B_layout": ["rank_major"]}, "lora_B_layout", "['rank_major']"),
        (
            {ONE_BY_ONE: {"parameters": {"down_proj": {"lora_B_layout": "mixed"}}}},
            "down_proj",
            "'mixed'",
        ),
        ({ONE_BY_ONE: {"lora_A_layout": "rank_major"}}, "lora_A_layout", "'rank_major'"),
        (
            {
                "lora_B_layout": "rank_major",
                ONE_BY_ONE: {"parameters": {"down_proj": {"lora_B_layout": "grouped_by_expert"}}},
            },
            "down_proj",
            "'grouped_by_expert'",
        ),
    ],
)
def test_any_other_word_is_refused(saved, fields, where, message):
    saved.edit(**fields)
    error = refusal(ConfigError, saved.directory)
    assert where in error.where
    assert error.found == message
    assert "rank_major" in error.expected or "grouped_by_expert" in error.expected


def of_unsloth(saved, sign):
    if sign == "README.md":
        (saved.directory / "README.md").write_text("---\ntags:\n- unsloth\n---\n")
    elif sign == "auto_mapping":
        saved.edit(auto_mapping={"base_model_class": "X", "unsloth_fixed": True})
    else:
        saved.edit(base_model_name_or_path="unsloth/Qwen3-30B-A3B")


SIGNS = ["README.md", "auto_mapping", "base_model_name_or_path"]


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIGNS)
def test_a_file_of_unsloths_that_does_not_say_is_refused(model, saved, sign):
    (saved.directory / "README.md").unlink(missing_ok=True)
    assert formats.read(saved.directory).sites
    saved.group()
    of_unsloth(saved, sign)
    error = refusal(ConfigError, saved.directory)
    assert (error.where, error.found) == ("adapter_config.json: lora_B_layout", "nothing")
    for word in ("rank_major or grouped_by_expert", sign, "lora_b_layout", "--lora-b-layout"):
        assert word in error.expected
    adapter = formats.read(saved.directory, lora_b_layout="grouped_by_expert")
    check_pefts(model, adapter, saved.logits)
    isolated = isolation.read_isolated(saved.directory, lora_b_layout="grouped_by_expert")
    assert isolated.digest == adapter.digest


@pytest.mark.parametrize("sign", SIGNS)
def test_a_file_of_unsloths_without_fused_experts_is_read(edited, tmp_path, sign):
    saved = object.__new__(Saved)
    saved.directory = edited("lora")
    digest = formats.read(saved.directory).digest
    of_unsloth(saved, sign)
    assert formats.read(saved.directory).digest == digest


def test_a_layout_that_contradicts_the_config_is_refused(saved):
    saved.edit(lora_B_layout="rank_major")
    with pytest.raises(ConfigError, match="found 'rank_major', expected grouped_by_expert, the"):
        formats.read(saved.directory, lora_b_layout="grouped_by_expert")
    assert formats.read(saved.directory, lora_b_layout="rank_major").sites


@pytest.mark.parametrize("case", ["lora", "drlora", "mola", "loramoe-official", "dynmole-k1"])
def test_a_layout_without_fused_experts_is_refused(golden, case):
    with pytest.raises(UnsupportedError, match="lora_b_layout: found rank_major, expected none"):
        formats.read(golden / "cases" / case, lora_b_layout="rank_major")


def test_a_layout_of_a_canonical_copy_is_refused(saved, tmp_path):
    native.write(formats.read(saved.directory), tmp_path / "copy")
    with pytest.raises(UnsupportedError, match="every expert by itself"):
        formats.read(tmp_path / "copy", lora_b_layout="rank_major")


def test_a_layout_in_a_config_without_fused_experts_is_a_warning(edited):
    (warning,) = formats.read(edited("lora", {"lora_B_layout": "rank_major"})).warnings
    assert "lora_B_layout without fused experts has no effect" in warning


def test_parameters_of_one_layer_are_those_of_that_layer(model, saved):
    """PEFT adapts what `target_parameters` ends with, and drops what the file holds beside that."""
    saved.edit(target_parameters=[f"layers.1.{name}" for name in BOTH])
    error = refusal(UnsupportedError, saved.directory)
    assert error.found == "tensors of fused experts"
    assert "layers.0.mlp.experts" in error.where


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_commands_take_a_layout(saved, tmp_path, capsys):
    digest = formats.read(saved.directory).digest
    saved.group()
    of_unsloth(saved, "auto_mapping")
    assert command(inspect, saved.directory, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["where"] == "adapter_config.json: lora_B_layout"
    option = "--lora-b-layout=grouped_by_expert"
    assert command(inspect, saved.directory, "--json", option) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == digest
    assert command(convert, saved.directory, tmp_path / "copy", option) == 0
    assert formats.read(tmp_path / "copy").digest == digest
    assert command(merge, saved.directory, tmp_path / "merged", option, "--json") == 0
    assert len(formats.read(tmp_path / "merged").sites) == len(
        formats.read(tmp_path / "copy").sites
    )
