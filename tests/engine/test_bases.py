"""This year's bases, each with PEFT's LoRA on every linear, hot-loaded and mixed with the base.

The oracle is Transformers with PEFT in float32. All engines run in one process after another; those
that are much like one that is here run where MOLEHILL_LONG_TESTS=1.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import bases, in_process
from support.asking import assert_golden
from support.bases import Base
from support.in_process import Answers, Job

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.shapes import base_model

LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"
# One of each kind of what adapters meet in a base.
ALWAYS = (
    "gemma3_text",
    "glm4",
    "gemma4_key_as_value",
    "gemma4_per_layer_inputs",
    "qwen2_moe",
    "granitemoehybrid",
    "falcon",
)
Asked = Mapping[str, tuple[Job, Answers]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any, request: Any) -> Asked:
    """Of the bases whose tests are run now."""
    directory: Path = tmp_path_factory.mktemp("bases")
    tests = [item for item in request.session.items if item.path == request.path]
    wanted = {test.callspec.params["name"] for test in tests}
    names = [name for name in (bases.BASES if LONG else ALWAYS) if name in wanted]
    jobs = {name: bases.make(name, directory) for name in names}
    answers = in_process.answer(jobs, directory)
    return {name: (job, answers[name]) for name, job in jobs.items()}


def parameters(wanted: Callable[[Base], bool] = lambda _: True) -> list[Any]:
    rest = pytest.mark.skipif(not LONG, reason="minutes for all; MOLEHILL_LONG_TESTS=1 runs it")
    marks = {name: () if name in ALWAYS else (rest,) for name in bases.BASES}
    names = [name for name, base in bases.BASES.items() if wanted(base)]
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", parameters())
def test_base_and_adapters_in_one_batch_match_the_oracle(asked: Asked, name: str) -> None:
    job, answers = asked[name]
    assert_golden(in_process.replies_of(answers, job.prompts), job.prompts)


@pytest.mark.parametrize("name", parameters())
def test_adapters_fit_the_shapes_of_the_config(asked: Asked, name: str) -> None:
    """As `molehill inspect --model` holds them against it."""
    job, _ = asked[name]
    base = base_model(job.model)
    for adapter in {prompt.case for prompt in job.prompts} - {"base"}:
        assert problems(formats.read(job.adapters[adapter], base=base), base, Limits()) == []


@pytest.mark.parametrize("name", parameters(lambda base: bool(base.refused)))
def test_a_refusal_says_why(asked: Asked, name: str) -> None:
    _, answers = asked[name]
    assert re.search(bases.BASES[name].refused, answers.refused["refused"])
