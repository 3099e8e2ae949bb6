"""Bases whose weights are in int8 or in 4 bits: LoRA, a mixture, and what reads weights.

Each is made quantised here, and held against Transformers with the numbers that its bits stand for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import in_process, mixtures, quantised, tiny_models
from support.architectures import ids_of_prompts
from support.golden import Prompt
from support.in_process import Answers, Job
from support.quantised import SCHEMES

from molehill.engine.vllm.quantisation import has_int4_kernel

# Of the logits' standard deviation. Of int8 in float32 it is numbers that lie between two steps,
# which two roundings of float32 put to either; of 4 bits, bfloat16 against float32.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.06}
MIXED = ("q_proj", "gate_proj", "down_proj")
ADAPTERS = ("dynmole", "lora", "dora", "hra")
needs_avx512 = pytest.mark.skipif(
    not has_int4_kernel(), reason="vLLM's CPU kernel for 4-bit weights needs AVX-512"
)
EACH = [
    pytest.param(name, marks=needs_avx512 if scheme.four_bits else ())
    for name, scheme in SCHEMES.items()
]
Asked = Mapping[str, tuple[Job, Answers]]


@torch.no_grad()
def logits(model: Any, name: str, ids: list[int]) -> Prompt:
    after = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return Prompt(name, tuple(ids), (int(after.argmax()),), after)


def make(name: str, directory: Path) -> Job:
    scheme, ids = SCHEMES[name], ids_of_prompts(3)
    source = tiny_models.build("mistral", directory / name)
    model = tiny_models.load(source)
    path = quantised.quantise(scheme, source, model, directory / name / "base", ids)
    prompts = [logits(model, "base", token_ids) for token_ids in ids]
    recipe = mixtures.dynmole(model, MIXED, seed=5)
    recipe.save(directory / name / "dynmole")
    with recipe.attached(model):
        prompts += [logits(model, "dynmole", token_ids) for token_ids in ids]
    for adapter, adapted in quantised.adapters(model, directory / name):
        prompts += [logits(adapted, adapter, token_ids) for token_ids in ids]
    prompts.sort(key=lambda prompt: len(prompt.ids))
    paths = {adapter: directory / name / adapter for adapter in ADAPTERS}
    return Job(path, paths, prompts, 1, {"dtype": scheme.dtype})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any) -> Asked:
    directory: Path = tmp_path_factory.mktemp("quantised")
    names = [n for n, scheme in SCHEMES.items() if has_int4_kernel() or not scheme.four_bits]
    jobs = {name: make(name, directory) for name in names}
    answers = in_process.answer(jobs, directory)
    return {name: (job, answers[name]) for name, job in jobs.items()}


def distances(asked: tuple[Job, Answers], name: str) -> list[float]:
    """Of logits after each prompt, in their standard deviations."""
    job, answers = asked
    replies = in_process.replies_of(answers, job.prompts)
    return [
        float((reply.logits - prompt.logits).std() / prompt.logits.std())
        for reply, prompt in zip(replies, job.prompts, strict=True)
        if prompt.case == name
    ]


@pytest.mark.parametrize("scheme", EACH)
@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_base_and_adapters_in_one_batch_match_the_definition(
    asked: Asked, scheme: str, name: str
) -> None:
    assert max(distances(asked[scheme], name)) < TOLERANCE[SCHEMES[scheme].dtype]


@pytest.mark.parametrize("scheme", EACH)
def test_every_adapter_moves_the_logits_by_more_than_the_bound(asked: Asked, scheme: str) -> None:
    job, _ = asked[scheme]
    base = {prompt.ids: prompt.logits for prompt in job.prompts if prompt.case == "base"}
    for prompt in job.prompts:
        if prompt.case != "base":
            moved = (prompt.logits - base[prompt.ids]).std() / base[prompt.ids].std()
            assert moved > 5 * TOLERANCE[SCHEMES[scheme].dtype], prompt.case
