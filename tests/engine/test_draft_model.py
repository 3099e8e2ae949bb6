"""Drafts of a model of its own, verified by a base with adapters: the draft model has none."""

from pathlib import Path
from typing import Any

import pytest
from support import in_process
from support.asking import assert_golden
from support.golden import TINY_LLAMA, Case, served_path
from support.in_process import Answers, Job

CASES = ("base", "dynmole-default", "mixlora", "lora")
DRAFTS = {"method": "draft_model", "model": str(TINY_LLAMA), "num_speculative_tokens": 2}
ACCEPTED, DRAFTED = (f"vllm:spec_decode_num_{what}_tokens" for what in ("accepted", "draft"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any) -> tuple[Job, Answers]:
    directory: Path = tmp_path_factory.mktemp("drafts")
    prompts = [Case(case).prompts[i] for i in range(3) for case in CASES]
    adapters = {case: served_path(case) for case in CASES[1:]}
    options = {"speculative_config": DRAFTS, "disable_log_stats": False}
    job = Job(TINY_LLAMA, adapters, prompts, 12, options)
    return job, in_process.answer({"drafts": job}, directory)["drafts"]


def test_tokens_are_the_oracles_whoever_drafted_them(asked: tuple[Job, Answers]) -> None:
    job, answers = asked
    assert_golden(in_process.replies_of(answers, job.prompts), job.prompts)


def test_drafts_are_the_bases_and_the_adapters_say_otherwise(asked: tuple[Job, Answers]) -> None:
    """The base accepts all of what is its own; adapters that accepted as much would be the base."""
    job, answers = asked
    assert not answers.failed, answers.failed
    accepted, drafted = answers.counters[ACCEPTED], answers.counters[DRAFTED]
    base = sum(prompt.case == "base" for prompt in job.prompts)
    # Of 12 tokens two in three are drafts.
    assert accepted >= base * 6
    assert accepted < drafted
