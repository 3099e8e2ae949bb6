"""A multimodal base with an image in the request: its language model takes adapters, and no other
part does."""

from pathlib import Path
from typing import Any

import pytest
from support import in_process, mixtures, multimodal
from support.asking import assert_golden
from support.in_process import Answers, Job
from support.oracle import MARGIN, peft_lora

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.modalities import REFUSAL
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.shapes import base_model

STEPS = 6
OF_TEXT = r".*\.language_model\..*_proj"
LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
# By name: what PEFT adapts, in the tower of images too.
REFUSED = {"tower": r".*\.vision_tower\..*\.q_proj", "everything": r".*\.(q_proj|up_proj)"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any) -> tuple[Job, Answers]:
    directory: Path = tmp_path_factory.mktemp("multimodal")
    path, inputs = multimodal.build(directory), multimodal.inputs()
    prompts = []

    def ask(model: Any, name: str) -> None:
        prompts.extend(multimodal.answer(model, name, one, STEPS, MARGIN) for one in inputs)

    model = multimodal.load(path)
    ask(model, "base")
    text = model.model.language_model
    recipe = mixtures.dynmole(text, ("q_proj", "up_proj", "down_proj"), seed=5)
    recipe.save(directory / "dynmole")
    with recipe.attached(text):
        ask(model, "dynmole")
    ask(peft_lora(model, OF_TEXT, (), directory / "lora"), "lora")
    for name, linears in REFUSED.items():
        peft_lora(multimodal.load(path), linears, (), directory / name)
    adapters = {name: directory / name for name in ("dynmole", "lora", *REFUSED)}
    given = dict(enumerate(inputs * 3))
    options = {"limit_mm_per_prompt": {"image": 1}}
    job = Job(path, adapters, prompts, STEPS, options, given)
    return job, in_process.answer({"gemma3": job}, directory)["gemma3"]


def test_base_and_adapters_in_one_batch_match_the_oracle(asked: tuple[Job, Answers]) -> None:
    job, answers = asked
    assert_golden(in_process.replies_of(answers, job.prompts), job.prompts)


def test_an_image_changes_what_is_answered(asked: tuple[Job, Answers]) -> None:
    """Of the oracle's answers; or images would not be tested."""
    job, _ = asked
    with_image, _, without = (prompt.greedy for prompt in job.prompts[:3])
    assert with_image != without


@pytest.mark.parametrize("name", REFUSED)
def test_the_tower_of_images_is_refused(asked: tuple[Job, Answers], name: str) -> None:
    """By the worker, and by `molehill inspect`, of whatever base; and no linear of it is one that
    an adapter could have."""
    job, answers = asked
    assert REFUSAL in answers.refused[name]
    with pytest.raises(UnsupportedError, match=f"vision_tower.*{REFUSAL}"):
        formats.read(job.adapters[name])
    base = base_model(job.model)
    assert base.refusal("vision_tower.encoder.layers.0.self_attn.q_proj") == REFUSAL
    assert set(base.linears) == {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert problems(formats.read(job.adapters["lora"], base=base), base, Limits()) == []
