"""The golden cases through the engine on a GPU: compiled and captured with both model runners, and
eager."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.asking import ask, ask_worker, every_prompt, request
from support.engines import engine
from support.golden import SERVED, Prompt, greatest_difference
from support.gpu_reference import Reference

from molehill.engine.vllm import protocol

# vLLM's attention multiplies float32 in TF32, which the base feels too: a mixture may differ by as
# much again.
LEEWAY, LEAST = 3.0, 1e-2
# A near-tie of a router goes the other way at such a difference; of a case's prompts, one may.
TIES = 1
CAPTURED = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96]}}
# MoV is served in eager mode only: no graph may hold its launches for servers that never see it.
EAGER_ONLY = ("mov",)


def served(llm: Any) -> list[str]:
    is_eager = llm.llm_engine.model_config.enforce_eager
    return [name for name in SERVED if is_eager or name not in EAGER_ONLY]


def prompts_of(llm: Any) -> list[Prompt]:
    return [prompt for prompt in every_prompt() if prompt.case in ("base", *served(llm))]


@pytest.fixture(scope="module", params=["second runner", "first runner", "eager"])
def llm(request: pytest.FixtureRequest) -> Iterator[Any]:
    before = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0" if request.param == "first runner" else "1"
    try:
        eager = {"enforce_eager": True}
        with engine(
            gpu_memory_utilization=0.3,
            attention_backend="TRITON_ATTN",
            max_num_seqs=96,
            **(eager if request.param == "eager" else CAPTURED),
        ) as llm:
            yield llm
    finally:
        if before is None:
            del os.environ["VLLM_USE_V2_MODEL_RUNNER"]
        else:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = before


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def assert_as_the_reference(llm: Any, reference: Reference, prompts: list[Prompt]) -> None:
    """Greedy tokens are those of the golden cases, logits near the reference's on this GPU."""
    replies = ask(llm, prompts)
    wrong = [
        f"{prompt.case}: {reply.tokens} is not {prompt.greedy}"
        for reply, prompt in zip(replies, prompts, strict=True)
        if reply.tokens != prompt.greedy
    ]
    assert not wrong, "\n".join(wrong)
    differences: dict[str, list[float]] = {}
    for reply, prompt in zip(replies, prompts, strict=True):
        expected = reference.logits(prompt)[0]
        result = greatest_difference(reply.logits, expected)
        differences.setdefault(prompt.case, []).append(result)
    most = max(LEAST, LEEWAY * max(differences["base"]))
    far = {
        case: tokens_off
        for case, tokens_off in differences.items()
        if sum(d > most for d in tokens_off) > TIES
    }
    assert not far, f"expected logits within {most:.2g}, found {far}"


def test_every_method_in_one_batch_is_right(llm: Any, reference: Reference) -> None:
    """None may be refused: loading raises."""
    for name in served(llm):
        llm.llm_engine.add_lora(request(name))
    assert_as_the_reference(llm, reference, prompts_of(llm))


def test_adapters_come_and_go_while_the_graphs_stay(llm: Any, reference: Reference) -> None:
    """What was captured before serves what was stored after, in other slots than before."""
    names = list(SERVED)
    for name in names[1:4]:
        llm.llm_engine.remove_lora(request(name).lora_int_id)
    for name in reversed(names[1:4]):
        llm.llm_engine.add_lora(request(name))
    llm.reset_prefix_cache()
    assert_as_the_reference(llm, reference, prompts_of(llm))


def test_no_kernel_was_compiled_while_requests_waited(llm: Any) -> None:
    """Whose tests ran before this one."""
    reply = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    assert reply.compilations == 0


def test_alone_each_is_what_it_is_in_company(llm: Any, reference: Reference) -> None:
    llm.reset_prefix_cache()
    for prompt in prompts_of(llm)[: 1 + len(served(llm))]:
        (reply,) = ask(llm, [prompt])
        assert reply.tokens == prompt.greedy, prompt.case
