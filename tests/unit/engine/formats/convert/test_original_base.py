"""Adapters that PEFT trained beside changed base weights: for the base before, and for that one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tuners
from support.authored import tiny_llama
from support.broken import refusal
from support.golden import TINY_LLAMA, greatest_difference

from molehill.api.cli import convert, inspect
from molehill.engine import formats
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach

peft = pytest.importorskip("peft", reason="the dev extra is not installed")

TARGETS = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"r": 3, "lora_alpha": 5, "rank_pattern": {"layers.2.self_attn.q_proj": 2}},
    "pissa_niter_2": {"r": 3, "lora_alpha": 5},
    "olora": {"r": 3, "lora_alpha": 5, "alpha_pattern": {"down_proj": 2}},
    "olora-rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "use_dora": True},
    "corda": {"r": 3, "lora_alpha": 5},
}


def train(name: str, directory: Path) -> tuple[torch.Tensor, Any]:
    """Saves `initial` and `trained` below `directory`: PEFT's logits, and its base afterwards."""
    settings = OPTIONS[name]
    if name == "corda":
        from peft.tuners.lora.config import CordaConfig

        settings = {**settings, "corda_config": CordaConfig(corda_method="kpm")}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=TARGETS,
        init_lora_weights=name.split("-")[0],
        **settings,
    )
    torch.manual_seed(3)
    base = tiny_llama()
    if name == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        # As many as make the inputs' covariance regular.
        ids = torch.randint(3, 500, (1, 500))
        preprocess_corda(base, config, lambda: base(ids))
    model = peft.get_peft_model(base, config)
    # As PEFT's documentation has it: a copy that says that its base is as it was.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(directory / "initial")
    model.peft_config["default"].init_lora_weights = config.init_lora_weights = name.split("-")[0]
    tuners.change(model, {"lora_A": 0.1, "lora_B": 0.1}, seed=3)
    model.eval().save_pretrained(directory / "trained")
    return tuners.logits(model), model.unload()


def answers(adapter: Any, model: Any) -> torch.Tensor:
    with attach(model, adapter), torch.no_grad():
        return tuners.logits(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Any:
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = (directory, *train(name, directory))
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("pissa", "base"),
        ("olora", "base"),
        ("olora-rslora", "base"),
        ("pissa", "initial"),
        ("olora-rslora", "initial"),
        ("pissa_niter_2", "initial"),
        ("corda", "initial"),
    ],
)
def test_converted_it_answers_as_in_training(
    trained: Any, tmp_path: Path, name: str, option: str
) -> None:
    directory, expected, _ = trained(name)
    value = {"base": str(TINY_LLAMA), "initial": str(directory / "initial")}[option]
    arguments = [str(directory / "trained"), str(tmp_path / "copy"), f"--{option}", value]
    assert convert.main(arguments) == 0
    adapter = native.read(tmp_path / "copy", formats.DEFAULT_LIMITS)
    # The golden base's file is in bfloat16, PEFT had it in float32.
    assert [text.split(",")[0] for text in adapter.warnings] == (
        ["the base's file is in bfloat16"] if option == "base" else []
    )
    assert greatest_difference(tuners.logits(tiny_llama()), expected) > 0.1
    assert greatest_difference(answers(adapter, tiny_llama()), expected) < 1e-4


@pytest.mark.parametrize("name", ["pissa", "olora-rslora", "corda"])
def test_on_the_changed_base_it_is_served_as_it_is(trained: Any, name: str) -> None:
    directory, expected, changed_base = trained(name)
    adapter = formats.read(directory / "trained", base_is_residual=True)
    (warning,) = adapter.warnings
    assert "right only on the base as it was in training" in warning
    assert greatest_difference(answers(adapter, changed_base), expected) < 1e-4


def test_the_config_may_say_so_too(trained: Any, tmp_path: Path) -> None:
    directory, _, _ = trained("pissa")
    shutil.copytree(directory / "trained", tmp_path / "copy")
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_is_residual": True}))
    said = formats.read(tmp_path / "copy")
    assert said.digest == formats.read(directory / "trained", base_is_residual=True).digest


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pissa", "molehill convert --base MODEL SRC DST"),
        ("olora", "molehill convert --base MODEL SRC DST"),
        ("pissa_niter_2", "molehill convert --initial DIR SRC DST"),
        ("corda", "molehill convert --initial DIR SRC DST"),
    ],
)
def test_a_refusal_names_the_command(trained: Any, name: str, command: str, capsys: Any) -> None:
    directory, _, _ = trained(name)
    error = refusal(UnsupportedError, directory / "trained")
    assert error.found == f"{name!r}, which changes the base weights"
    assert command in error.expected
    assert '"base_is_residual": true' in error.expected
    assert inspect.main([str(directory / "trained")]) == 1
    assert command in capsys.readouterr().err
    assert inspect.main([str(directory / "trained"), "--base-is-residual"]) == 0


@pytest.mark.parametrize("name", ["pissa_niter_2", "corda"])
def test_what_the_base_does_not_determine_is_refused(
    trained: Any, tmp_path: Path, name: str, capsys: Any
) -> None:
    arguments = [str(trained(name)[0] / "trained"), str(tmp_path / "copy")]
    assert convert.main([*arguments, "--base", str(TINY_LLAMA)]) == 1
    assert "the base weights do not determine" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_an_activated_one_is_not_converted(trained: Any, tmp_path: Path, capsys: Any) -> None:
    """Up to its invocation the tokens are those of the base as it was in training."""
    shutil.copytree(trained("pissa")[0] / "trained", tmp_path / "activated")
    config = tmp_path / "activated" / "adapter_config.json"
    document = json.loads(config.read_text()) | {"alora_invocation_tokens": [5, 6]}
    config.write_text(json.dumps(document))
    arguments = [str(tmp_path / "activated"), str(tmp_path / "copy")]
    assert convert.main([*arguments, "--base", str(TINY_LLAMA)]) == 1
    assert "needs the changed base" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
    assert convert.main([*arguments, "--base-is-residual"]) == 0
    adapter = native.read(tmp_path / "copy", formats.DEFAULT_LIMITS)
    assert adapter.invocation_tokens == (5, 6)


def test_a_residual_base_is_refused_for_other_adapters(golden: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        formats.read(golden / "cases" / "rslora", base_is_residual=True)
    assert caught.value.where == "base_is_residual"
    assert "leaves the base as it is" in caught.value.expected


def test_of_a_float32_base_nothing_is_said(trained: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    arguments = [str(trained("pissa")[0] / "trained"), str(tmp_path / "copy")]
    assert convert.main([*arguments, "--base", str(tmp_path / "base")]) == 0
    assert native.read(tmp_path / "copy", formats.DEFAULT_LIMITS).warnings == ()
