"""Pipeline stages: each has its own layers, and adapters are on all of them or on none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import big_adapter, vocabulary
from support.architectures import EXTRA_VOCAB, ids_of_prompts
from support.asking import IDS, LOGIT_TOLERANCE, ask, ask_each, assert_golden, every_prompt, request
from support.engines import engine
from support.golden import SERVED, TINY_LLAMA, VOCABULARY, Case, greatest_difference
from support.oracle import answer
from support.routed import assert_routing_of_golden_cases
from transformers import AutoModelForCausalLM

from molehill.api.metrics.worker_stats import by_generation
from molehill.engine import formats
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.vllm import protocol
from molehill.engine.vllm.settings import Settings

LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"
# Bytes on one rank: room for all golden adapters, and not for half of the large one.
MEMORY = 20 << 20
# The layers of each stage.
FIRST, SECOND = ("layers.0.", "layers.1."), ("layers.2.", "layers.3.")
# Of adapters beside the golden ones.
LATER, LARGE, ONE_STAGE, NOWHERE, WORDS = 60, 61, 62, 63, 80


@pytest.fixture(
    scope="module",
    params=[
        (1, "auto"),
        pytest.param(
            (2, "auto"),
            marks=pytest.mark.skipif(
                not LONG, reason="four workers, a minute; MOLEHILL_LONG_TESTS=1 runs it"
            ),
        ),
        pytest.param(
            (1, "torch"),
            marks=pytest.mark.skipif(
                not LONG, reason="the same once more, a minute; MOLEHILL_LONG_TESTS=1 runs it"
            ),
        ),
    ],
    ids=[
        "two stages",
        "two stages of two tensor-parallel ranks",
        "two stages, torch backend",
    ],
)
def llm(request: Any) -> Iterator[Any]:
    ranks, backend = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(["0", "1"] * ranks))
        with engine(
            pipeline_parallel_size=2,
            tensor_parallel_size=ranks,
            distributed_executor_backend="mp",
            max_loras=40,
            hf_overrides={"vocab_size": VOCABULARY + EXTRA_VOCAB},
            additional_config=Settings(backend, MEMORY, extra_vocab=EXTRA_VOCAB).to_config(),
        ) as result:
            yield result


def test_adapters_that_are_loaded_beside_running_requests_match_the_reference(llm: Any) -> None:
    """Every method: first the base alone, then all in one batch."""
    from vllm import SamplingParams

    running = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    base = Case("base").prompts
    for number, prompt in enumerate(base):
        running.add_request(str(number), {"prompt_token_ids": list(prompt.ids)}, sampling)
    for case in SERVED:
        running.step()
        assert running.add_lora(request(case))
    finished = {}
    while running.has_unfinished_requests():
        finished |= {output.request_id: output for output in running.step() if output.finished}
    for number, prompt in enumerate(base):
        tokens = finished[str(number)].outputs[0].token_ids
        assert (len(tokens), tuple(tokens[:12])) == (200, prompt.greedy)
    prompts = every_prompt()
    assert_golden(ask(llm, prompts), prompts)
    stats = by_generation(stages(llm))
    for case in SERVED:
        # Of 12 tokens the last is never read, and those in the prefix cache are not read again.
        read = sum(len(prompt.ids) + 11 for prompt in Case(case).prompts)
        assert stats[IDS[case]].stats.tokens == read, case


def test_each_stage_tells_what_its_routers_chose(llm: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    assert_routing_of_golden_cases(llm, model)


def stages(llm: Any) -> list[protocol.StatsReply]:
    asked = protocol.to_wire(protocol.StatsRequest())
    replies = protocol.STATS.replies(llm.collective_rpc(protocol.STATS.method, args=(asked,)))
    assert {reply.stage for reply in replies} == {0, 1}
    return replies


def lora(name: str, number: int, path: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def test_what_one_stage_refuses_is_on_none(llm: Any, tmp_path: Path) -> None:
    """The second stage has no memory for it, the first would not even need any."""
    assert big_adapter.save(tmp_path / "large", 64, SECOND) > 2 * MEMORY
    before = llm.llm_engine.list_loras()
    # Twice: an answer of the first time would be taken for one of the second.
    for _ in range(2):
        with pytest.raises(Exception, match="adapter memory: found"):
            llm.llm_engine.add_lora(lora("large", LARGE, tmp_path / "large"))
    assert llm.llm_engine.list_loras() == before
    reports = [reply.adapters[LARGE] for reply in stages(llm) if LARGE in reply.adapters]
    assert all(report.resident_bytes is None for report in reports)
    # Nobody waits for anybody.
    prompts = every_prompt()[:4]
    assert_golden(ask(llm, prompts), prompts)


@torch.no_grad()
def test_an_adapter_with_nothing_on_one_stage_serves(llm: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    ids = list(Case("mixlora").prompts[0].ids)
    for number, layers in enumerate((FIRST, SECOND)):
        whole = formats.read(Case("mixlora").path)
        sites = {site: part for site, part in whole.sites.items() if site.startswith(layers)}
        part = Adapter(whole.kind, sites)
        name = f"stage-{number}"
        native.write(part, tmp_path / name)
        served = lora(name, ONE_STAGE + 10 * number, tmp_path / name)
        assert llm.llm_engine.add_lora(served)
        (reply,) = ask_each(llm, [ids], [served], tokens=1)
        with attach(model, part):
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert greatest_difference(reply.logits, logits) <= LOGIT_TOLERANCE
        taken = {
            reply.stage: reply.adapters[served.lora_int_id].resident_bytes for reply in stages(llm)
        }
        assert taken[1 - number] == 0 < (taken[number] or 0)


def test_words_are_looked_up_on_the_first_stage_and_answered_on_the_last(
    llm: Any, tmp_path: Path
) -> None:
    """Of adapters that add tokens, by PEFT's answers, in one batch with the base."""
    pytest.importorskip("peft", reason="the dev extra is not installed")
    prompts = [Case("base").prompts[0]]
    requests: dict[str, Any] = {"base": None}
    for number, name in enumerate(("grown-saved", "grown-both", "on-both")):
        oracle = vocabulary.author(TINY_LLAMA, tmp_path / name, name)
        requests[name] = lora(name, WORDS + number, tmp_path / name)
        assert llm.llm_engine.add_lora(requests[name])
        added = [VOCABULARY, VOCABULARY + 1] if name in vocabulary.GROWN else []
        prompts += [answer(oracle, name, [*added, *ids], 12) for ids in ids_of_prompts(5)[:2]]
        prompts.append(Case("base").prompts[number])
    assert any(max(prompt.greedy) >= VOCABULARY for prompt in prompts)
    ids = [list(prompt.ids) for prompt in prompts]
    assert_golden(ask_each(llm, ids, [requests[prompt.case] for prompt in prompts]), prompts)
    for name in requests.keys() - {"base"}:
        assert llm.llm_engine.remove_lora(requests[name].lora_int_id)


def test_an_adapter_with_nothing_on_any_stage_is_refused(llm: Any, tmp_path: Path) -> None:
    whole = formats.read(Case("lora").path)
    sites = {site.replace("layers.", "layers.7"): part for site, part in whole.sites.items()}
    native.write(Adapter(whole.kind, sites), tmp_path / "nowhere")
    with pytest.raises(Exception, match=r"layers\.7"):
        llm.llm_engine.add_lora(lora("nowhere", NOWHERE, tmp_path / "nowhere"))
    assert NOWHERE not in llm.llm_engine.list_loras()


def test_an_adapter_that_nobody_announced_is_loaded_in_its_step(llm: Any) -> None:
    prompts = Case("mola").prompts
    served = lora("later", LATER, Case("mola").path)
    replies = ask_each(llm, [list(prompt.ids) for prompt in prompts], [served] * len(prompts))
    assert_golden(replies, prompts)
