"""Qwen2.5-VL and Qwen3-VL with images in the requests: positions in three dimensions (M-RoPE), and
what the tower's layers give to those of the language model (deepstack), beside adapters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import in_process, mixtures, multimodal, qwen_vl, torchvision
from support.asking import assert_golden
from support.in_process import Answers, Job
from support.oracle import MARGIN, peft_lora

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.modalities import REFUSAL
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.shapes import base_model

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("MOLEHILL_LONG_TESTS") != "1",
        reason="a process that imports vLLM anew; MOLEHILL_LONG_TESTS=1 runs it",
    ),
    pytest.mark.skipif(
        not torchvision.is_here(),
        reason="their processors need torchvision: MOLEHILL_TORCHVISION names a folder with it "
        "(tests/support/torchvision.py)",
    ),
]
BASES = tuple(qwen_vl.CONFIGS)
STEPS = 6
OF_TEXT = r".*\.language_model\..*_proj"
REFUSED = {"tower": r".*\.visual\..*\.qkv", "everything": r".*\.(q_proj|qkv)"}
Asked = Mapping[str, tuple[Job, Answers]]


def make(base: str, directory: Path) -> Job:
    directory.mkdir()
    path, inputs = qwen_vl.build(base, directory), qwen_vl.inputs(base)
    prompts = []

    def ask(model: Any, name: str) -> None:
        prompts.extend(qwen_vl.answer(model, base, name, one, STEPS, MARGIN) for one in inputs)

    model = multimodal.load(path)
    ask(model, "base")
    text = model.model.language_model
    recipes = {
        "dynmole": mixtures.dynmole(text, ("q_proj", "up_proj", "down_proj"), seed=5),
        "mixlora": mixtures.mixlora(text, "o_proj", seed=6),
    }
    for name, recipe in recipes.items():
        recipe.save(directory / name)
        with recipe.attached(text):
            ask(model, name)
    ask(peft_lora(model, OF_TEXT, (), directory / "lora"), "lora")
    for name, linears in REFUSED.items():
        peft_lora(multimodal.load(path), linears, (), directory / name)
    adapters = {name: directory / name for name in (*recipes, "lora", *REFUSED)}
    given = dict(enumerate(inputs * (2 + len(recipes))))
    options = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    return Job(path, adapters, prompts, STEPS, options, given)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any, request: Any) -> Asked:
    """Of the bases whose tests are run now."""
    directory: Path = tmp_path_factory.mktemp("qwen_vl")
    tests = [item for item in request.session.items if item.path == request.path]
    wanted = {test.callspec.params["base"] for test in tests}
    jobs = {base: make(base, directory / base) for base in BASES if base in wanted}
    answers = in_process.answer(jobs, directory, with_torchvision=True)
    return {base: (job, answers[base]) for base, job in jobs.items()}


@pytest.mark.parametrize("base", BASES)
def test_base_and_adapters_in_one_batch_match_the_oracle(asked: Asked, base: str) -> None:
    job, answers = asked[base]
    assert_golden(in_process.replies_of(answers, job.prompts), job.prompts)


@pytest.mark.parametrize("base", BASES)
def test_an_image_and_its_adapter_change_what_is_answered(asked: Asked, base: str) -> None:
    """Of the oracle's answers; or neither would be tested."""
    job, _ = asked[base]
    answered = {(prompt.case, prompt.ids): prompt.greedy for prompt in job.prompts}
    assert len(set(answered.values())) == len(answered)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", REFUSED)
def test_the_tower_of_images_is_refused(asked: Asked, base: str, name: str) -> None:
    """By the worker, and by `molehill inspect`, of whatever base; and no linear of it is one that
    an adapter could have."""
    job, answers = asked[base]
    assert REFUSAL in answers.refused[name]
    with pytest.raises(UnsupportedError, match=f"visual.*{REFUSAL}"):
        formats.read(job.adapters[name])
    shapes = base_model(job.model)
    assert shapes.refusal("visual.blocks.0.attn.qkv") == REFUSAL
    assert {site.split(".")[0] for site in shapes.linears} == {"layers"}
    for adapter in ("lora", "dynmole", "mixlora"):
        assert problems(formats.read(job.adapters[adapter], base=shapes), shapes, Limits()) == []
