"""Names of tensors as trainers, wrappers and converters write them, all of PEFT's own adapter."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.logits import logits_of
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter import modalities
from molehill.engine.adapter.errors import (
    CorruptFileError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.hf.reference import attach

TOKENS = [303, 316, 288, 262, 352, 17, 5]
P = "base_model.model."


@pytest.fixture(scope="module")
def model(golden):
    return AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def saved(golden, tmp_path_factory):
    """q and down by PEFT with unequal scalings; its directory and its logits."""
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    base = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"model.layers.1.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 5},
    )
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    directory = tmp_path_factory.mktemp("saved")
    wrapped.save_pretrained(directory)
    return directory, logits_of(wrapped, TOKENS)


def renamed(saved, directory, rename, **fields):
    directory.mkdir()
    config = json.loads((saved / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file({rename(n): t for n, t in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def replaced(pattern, by):
    return lambda name: re.sub(pattern, by, name)


RENAMED = {
    "adapter name": (replaced(r"\.weight$", ".default.weight"), "the adapter's name"),
    "another's name": (replaced(r"(lora_.)", r"\1.my-tuned_1"), "the adapter's name"),
    "ddp": (replaced(r"^", "module."), "wrappers of training"),
    "ddp inside": (replaced(r"^base_model.model.", P + "module."), "wrappers of training"),
    "compiled": (replaced(r"^", "_orig_mod."), "wrappers of training"),
    "compiled layers": (replaced(r"(layers\.\d+\.)", r"\1_orig_mod."), "wrappers of training"),
    "fsdp": (
        replaced(r"^(.*?)(layers\.\d+\.)", r"_fsdp_wrapped_module.\1\2_fsdp_wrapped_module."),
        "wrappers of training",
    ),
    "checkpointing": (
        replaced(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module."),
        "wrappers of training",
    ),
    "fsdp and checkpointing": (
        replaced(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module."),
        "wrappers of training",
    ),
    "no prefix": (replaced(rf"^{P}", ""), "no leading base_model.model"),
    "layers alone": (replaced(rf"^{P}model\.", P), None),
    "layers without a prefix": (replaced(rf"^{P}model\.", ""), "no leading base_model.model"),
    "in a multimodal model": (
        replaced(rf"^{P}model\.", f"{P}model.language_model."),
        "the language model of a multimodal one",
    ),
    "in an older multimodal model": (
        replaced(rf"^{P}model\.", f"{P}language_model.model."),
        "the language model of a multimodal one",
    ),
    "down and up": (
        lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        "lora_down",
    ),
    "all at once": (
        lambda name: (
            "module._orig_mod."
            + name.removeprefix(P)
            .replace("lora_A", "lora_down.default")
            .replace("lora_B", "lora_up.default")
        ),
        "no leading base_model.model",
    ),
}


@pytest.mark.parametrize("case", RENAMED)
def test_other_names_are_the_same_adapter_and_a_warning_says_so(saved, tmp_path, case):
    rename, what = RENAMED[case]
    plain = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}
    result = formats.read(renamed(saved[0], tmp_path / "a", rename, **plain))
    assert result.digest == formats.read(saved[0]).digest
    assert [warning for warning in result.warnings if what and what in warning] or not what
    assert len(result.warnings) == 0 if what is None else len(result.warnings) >= 1


def test_pefts_own_names_are_served_as_peft_does_without_a_word(model, saved):
    directory, expected = saved
    adapter = formats.read(directory)
    assert adapter.warnings == ()
    with attach(model, adapter):
        result = logits_of(model, TOKENS)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert (logits_of(model, TOKENS) - expected).abs().max() > 0.1


@pytest.mark.parametrize("part", ["vision_tower.encoder", "visual", "audio_tower"])
def test_parts_that_read_images_or_sounds_are_refused_by_name(saved, tmp_path, part):
    rename = replaced(r"model\.layers\.2\.", f"model.{part}.layers.2.")
    error = refusal(UnsupportedError, renamed(saved[0], tmp_path / "a", rename))
    assert f"model.{part}.layers.2." in error.where
    assert error.found == modalities.REFUSAL
    assert part.partition(".")[0] in error.expected


def test_full_names_are_those_of_any_surroundings(saved, tmp_path):
    """As PEFT writes them for all-linear on some models, and as a file's names were changed."""
    full = [
        f"model.language_model.layers.{i}.{name}"
        for i in range(4)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    same = lambda name: name  # noqa: E731
    result = formats.read(renamed(saved[0], tmp_path / "a", same, target_modules=full))
    assert (result.digest, result.warnings) == (formats.read(saved[0]).digest, ())
    error = refusal(
        UnsupportedError, renamed(saved[0], tmp_path / "b", same, target_modules=full[:-1])
    )
    assert error.where.endswith("model.layers.3.mlp.down_proj")


def test_alphas_of_modules_scale_as_the_config_would(saved, tmp_path):
    """Kohya's and LyCORIS's `.alpha` is divided by the rank of the module's own tensors."""
    adapter = formats.read(saved[0])
    directory = renamed(saved[0], tmp_path / "a", lambda n: n, rank_pattern={}, alpha_pattern={})
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        alpha = 5.0 if "down_proj" in name else 6.0
        tensors[name.replace("lora_A.weight", "alpha")] = torch.tensor(alpha)
    save_file(tensors, directory / "adapter_model.safetensors")
    assert formats.read(directory).digest == adapter.digest
    name = f"{P}model.layers.2.mlp.down_proj.alpha"
    for bad in (torch.zeros(()), torch.ones(2)):
        save_file({**tensors, name: bad}, directory / "adapter_model.safetensors")
        assert refusal(ShapeError, directory).where.endswith(name)


def test_two_names_of_one_tensor_are_an_error(saved, tmp_path):
    directory = renamed(saved[0], tmp_path / "a", lambda n: n)
    tensors = load_file(directory / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file(
        {**tensors, f"module.{name}": tensors[name] + 1}, directory / "adapter_model.safetensors"
    )
    error = refusal(CorruptFileError, directory)
    assert name in error.where
    assert "the same tensor as" in error.found


def test_two_adapters_in_one_file_are_an_error(saved, tmp_path):
    def two(name):
        return name.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two.")

    error = refusal(CorruptFileError, renamed(saved[0], tmp_path / "a", two))
    assert error.found == "tensors of the adapters one and two"


def test_errors_name_the_files_own_tensor(saved, tmp_path):
    directory = renamed(saved[0], tmp_path / "a", replaced(r"\.weight$", ".default.weight"))
    tensors = load_file(directory / "adapter_model.safetensors")
    name = next(name for name in tensors if "down_proj.lora_B" in name)
    save_file({**tensors, name: torch.ones(7, 5)}, directory / "adapter_model.safetensors")
    assert name in refusal(ShapeError, directory).where


@pytest.mark.slow
def test_patterns_shards_and_names_together_are_pefts_logits(authored, model):
    """The adapter that the engine's tests serve."""
    made = authored["renamed"]
    adapter = formats.read(made.path)
    assert len(adapter.sites) == 6
    assert {len(adapter.sites[f"layers.{i}.self_attn.q_proj"].experts.a) for i in (0, 1)} == {3, 4}
    with attach(model, adapter):
        for prompt in made.prompts:
            result = logits_of(model, prompt.ids)[-1]
            torch.testing.assert_close(result, prompt.logits, rtol=0, atol=1e-4)
