"""The golden cases through the vLLM engine, used as any vLLM user would."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import (
    LOGIT_TOLERANCE,
    Reply,
    ask,
    ask_each,
    ask_worker,
    assert_golden,
    every_prompt,
    request,
)
from support.golden import (
    ROUNDED,
    SERVED,
    TINY_LLAMA,
    Case,
    greatest_difference,
    served_path,
)
from support.routed import Chosen, asking, assert_chosen, chosen, gate_weights

from molehill.benchmarks.contestants import MOLEHILL, Contestant
from molehill.benchmarks.turns import Measurements
from molehill.benchmarks.workloads import Workload
from molehill.engine import formats
from molehill.engine.formats import native
from molehill.engine.vllm import protocol

ROUTER_TOLERANCE = 1e-5
# Alone and in company the same GEMMs run over other shapes: rounding of float32, not more.
BATCH_TOLERANCE = 1e-4
# Of a case's prompts, the only one that fills a block.
LONGEST = 3


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The base on Transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def replies(llm: Any) -> dict[str, list[Reply]]:
    """Every case in ONE batch: base, LoRA and every mixture together."""
    prompts = every_prompt()
    result: dict[str, list[Reply]] = {}
    for prompt, reply in zip(prompts, ask(llm, prompts), strict=True):
        result.setdefault(prompt.case, []).append(reply)
    return result


@pytest.mark.parametrize("case", ["base", *SERVED])
def test_mixed_batch_matches_the_reference(replies: dict[str, list[Reply]], case: str) -> None:
    assert_golden(replies[case], Case(case).prompts)


@dataclass(frozen=True)
class Alone:
    """Replies to a case's prompts, each asked for by itself. again: to the longest, once more."""

    first: list[Reply]
    again: Reply


@pytest.fixture(scope="module")
def alone(llm: Any) -> dict[str, Alone]:
    """One case after another, from an empty prefix cache on."""
    llm.reset_prefix_cache()

    def asked(name: str) -> Alone:
        prompts = Case(name).prompts
        first = [ask(llm, [prompt])[0] for prompt in prompts]
        return Alone(first, ask(llm, [prompts[LONGEST]])[0])

    return {name: asked(name) for name in ("base", *SERVED)}


@pytest.mark.parametrize("case", ["base", *SERVED])
def test_alone_gives_what_the_mixed_batch_gives(
    replies: dict[str, list[Reply]], alone: dict[str, Alone], case: str
) -> None:
    for unmixed, mixed in zip(alone[case].first, replies[case], strict=True):
        assert unmixed.tokens == mixed.tokens
        assert greatest_difference(unmixed.logits, mixed.logits) < BATCH_TOLERANCE


def test_prefix_cache_never_crosses_adapters(alone: dict[str, Alone]) -> None:
    """One prompt under every adapter, cold and warm: the cache hits only its own adapter."""
    longest = {name: Case(name).prompts[LONGEST] for name in alone}
    assert len({prompt.ids for prompt in longest.values()}) == 1
    for name, alone_replies in alone.items():
        assert_golden([alone_replies.first[LONGEST], alone_replies.again], [longest[name]] * 2)
    assert {alone_replies.first[LONGEST].cached for alone_replies in alone.values()} == {0}
    assert {alone_replies.again.cached for alone_replies in alone.values()} == {32}


@pytest.mark.parametrize("case", ["base", *SERVED])
def test_every_position_matches_the_reference(llm: Any, case: str) -> None:
    llm.reset_prefix_cache()
    (reply,) = ask(llm, Case(case).prompts[:1], tokens=1, prompt_logits=True)
    expected = Case(case).tensors["prompt0.logits"]
    assert reply.prompt_logits is not None
    assert greatest_difference(reply.prompt_logits, expected[:-1]) < LOGIT_TOLERANCE


@pytest.mark.parametrize("case", [name for name in SERVED if Case(name).routes()])
def test_router_weights_match_the_reference(llm: Any, case: str) -> None:
    llm.reset_prefix_cache()
    ask_worker(llm, protocol.TRACE, protocol.TraceRequest(True))
    ask(llm, Case(case).prompts[:1], tokens=1)
    reply = ask_worker(llm, protocol.TRACE, protocol.TraceRequest(False))
    result = {trace.site: trace for trace in reply.traces}
    expected = Case(case).routes()
    assert expected.keys() <= result.keys()
    for site, route in expected.items():
        trace = result[site]
        stats = {"p": trace.probabilities, "w": trace.weights, "entropy": trace.entropy}
        tolerance = ROUNDED.get(case, ROUTER_TOLERANCE)
        for figure, value in route.items():
            assert greatest_difference(stats[figure].tensor(), value) < tolerance, (site, figure)


ROUTED = [name for name in SERVED if Case(name).routes()]


@pytest.fixture(scope="module")
def captured(llm: Any) -> dict[str, Chosen]:
    """What was chosen for a prompt of every mixture and for its answer, in one batch with the same
    of others that do not ask."""
    cases = [*ROUTED, "base", "lora", *ROUTED]
    prompts = [Case(case).prompts[LONGEST] for case in cases]
    ids, requests = [list(prompt.ids) for prompt in prompts], [request(case) for case in cases]
    extra = {i: asking(case, 200) for i, case in enumerate(ROUTED)}
    assert_golden(ask_each(llm, ids, requests, extra=extra), prompts)
    return {case: chosen(llm, case, len(ids[i]) + 11) for i, case in enumerate(ROUTED)}


@pytest.mark.parametrize("case", ROUTED)
def test_captured_routing_is_the_reference_s(
    captured: dict[str, Chosen], tiny: Any, case: str
) -> None:
    """Every router, every token of prompt and answer but the last, which no model has read."""
    prompt = Case(case).prompts[LONGEST]
    weights = gate_weights(tiny, served_path(case), [*prompt.ids, *prompt.greedy[:-1]])
    assert_chosen(captured[case], weights, tolerance=ROUNDED.get(case, 0.0))


def test_nothing_is_kept_of_what_was_told_or_never_asked(llm: Any, captured: Any) -> None:
    assert captured
    part = protocol.TokenRange(0, 0, 5)
    for key in ("mixlora", "nobody"):
        reply = ask_worker(llm, protocol.ROUTES, protocol.RoutesRequest(key, (part,)))
        assert (reply.parts, reply.routers) == ([], ())


def test_counters_are_what_the_reference_chose(llm: Any) -> None:
    """Figures of one known prompt, by difference of two readings."""
    from vllm.lora.request import LoRARequest

    llm.reset_prefix_cache()
    case = Case("dynmole-default")
    fresh = LoRARequest("counted", 90, str(case.path))
    llm.llm_engine.add_lora(fresh)
    from vllm import SamplingParams

    llm.generate(
        [{"prompt_token_ids": list(case.prompts[0].ids)}],
        SamplingParams(temperature=0, max_tokens=1),
        lora_request=fresh,
        use_tqdm=False,
    )
    stats = ask_worker(llm, protocol.ROUTING, protocol.RoutingRequest(90))
    assert stats.tokens == len(case.prompts[0].ids)
    for site, route in case.routes().items():
        counted = stats.sites[site]
        assert counted.decisions == len(case.prompts[0].ids)
        assert list(counted.expert_tokens) == (route["w"] > 0).sum(0).tolist()
        assert counted.soft == int((route["entropy"] > 0.9).sum())
        assert counted.entropy == pytest.approx(route["entropy"].sum().item(), abs=1e-4)
    llm.llm_engine.remove_lora(90)


def test_removing_an_adapter_frees_it(llm: Any) -> None:
    from vllm.lora.request import LoRARequest

    path = str(Case("mixlora").path)
    llm.llm_engine.add_lora(LoRARequest("short-lived", 91, path))
    before = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    assert before.adapters[91].resident_bytes > 0
    assert llm.llm_engine.remove_lora(91)
    # Its figures are told once more.
    after = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    assert after.adapters[91].resident_bytes is None
    later = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    assert 91 not in later.adapters
    assert 91 not in llm.llm_engine.list_loras()


@pytest.mark.parametrize("name", ["dynmole-default", "mixlora", "mov", "dora"])
def test_an_adapter_comes_back_from_host_memory_as_it_was(
    llm: Any, tmp_path: Any, name: str
) -> None:
    """Stored, used, taken out and kept, stored again: the same answers, and counters from zero."""
    from vllm.lora.request import LoRARequest

    case, path = Case(name), str(tmp_path / "copy")
    native.write(formats.read(case.path), Path(path))
    request = LoRARequest(f"kept-{name}", 93, path)
    prompts = case.prompts
    ids, requests = [list(prompt.ids) for prompt in prompts], [request] * len(prompts)

    def install() -> None:
        asked = protocol.InstallRequest(request.lora_name, 93, path)
        assert ask_worker(llm, protocol.INSTALL, asked).refusal == ""

    def host() -> dict[int, int]:
        return ask_worker(llm, protocol.STATS, protocol.StatsRequest((93,))).host_bytes

    def prepare() -> bool:
        asked = protocol.AdapterRequest(93, path)
        started = ask_worker(llm, protocol.PREPARE, asked).reads
        while not ask_worker(llm, protocol.PREPARED, asked).done:
            time.sleep(0.01)
        return started

    llm.reset_prefix_cache()
    assert prepare()
    install()
    assert_golden(ask_each(llm, ids, requests), prompts)
    before = ask_worker(llm, protocol.ROUTING, protocol.RoutingRequest(93))
    ask_worker(llm, protocol.UNINSTALL, protocol.UninstallRequest(93, path, True))
    assert host()[93] > 0
    assert not prepare()
    install()
    assert 93 not in host()
    assert llm.reset_prefix_cache()
    assert_golden(ask_each(llm, ids, requests), prompts)
    after = ask_worker(llm, protocol.ROUTING, protocol.RoutingRequest(93))
    assert after.tokens == 2 * before.tokens
    for site, stats in before.sites.items():
        assert after.sites[site].decisions == 2 * stats.decisions, site
    ask_worker(llm, protocol.UNINSTALL, protocol.UninstallRequest(93, path, False))
    assert 93 not in host()


def test_names_of_the_same_bytes_have_a_host_copy_each(llm: Any, tmp_path: Any) -> None:
    """One that goes takes nothing of the other's with it, nor is it prepared in its place."""
    path = str(tmp_path / "copy")
    native.write(formats.read(Case("mola").path), Path(path))
    ids = (94, 95)

    def host() -> dict[int, int]:
        reply = ask_worker(llm, protocol.STATS, protocol.StatsRequest(ids))
        return {lora_id: size for lora_id, size in reply.host_bytes.items() if size}

    def asked(lora_id: int) -> protocol.AdapterRequest:
        return protocol.AdapterRequest(lora_id, path)

    def prepare(lora_id: int) -> bool:
        return ask_worker(llm, protocol.PREPARE, asked(lora_id)).reads

    def is_prepared(lora_id: int) -> bool:
        return ask_worker(llm, protocol.PREPARED, asked(lora_id)).done

    def install(lora_id: int) -> str:
        named = protocol.InstallRequest(f"m-{lora_id}", lora_id, path)
        return ask_worker(llm, protocol.INSTALL, named).refusal

    def uninstall(lora_id: int, keep: bool) -> protocol.UninstallReply:
        request = protocol.UninstallRequest(lora_id, path, keep)
        return ask_worker(llm, protocol.UNINSTALL, request)

    # Both are prepared at a time.
    assert all(prepare(lora_id) for lora_id in ids)
    while not all(is_prepared(lora_id) for lora_id in ids):
        time.sleep(0.01)
    for lora_id in ids:
        assert install(lora_id) == ""
    for lora_id in ids:
        assert uninstall(lora_id, True) == protocol.UninstallReply(True, ())
    sizes = host()
    assert sizes.keys() == set(ids)
    assert sizes[94] == sizes[95] > 0
    assert uninstall(94, False) == protocol.UninstallReply(False, ())
    assert host() == {95: sizes[95]}
    assert not prepare(95)
    assert install(95) == ""
    uninstall(95, False)
    assert host() == {}


def test_a_bad_adapter_is_refused_by_add_lora_and_the_engine_lives(llm: Any, tmp_path: Any) -> None:
    from vllm.lora.request import LoRARequest

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(Exception, match=r"adapter_config\.json"):
        llm.llm_engine.add_lora(LoRARequest("bad", 92, str(tmp_path)))
    assert 92 not in llm.llm_engine.list_loras()
    prompts = Case("mola").prompts
    assert_golden(ask(llm, prompts), prompts)


def test_a_bad_adapter_met_in_a_step_never_answers_as_the_base(llm: Any, tmp_path: Any) -> None:
    """Plain `generate` with an adapter that cannot be loaded: its output is void, no other is."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base, mola = Case("base").prompts[0], Case("mola").prompts[0]
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in (base.ids, base.ids, mola.ids)],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        lora_request=[LoRARequest("nothing", 93, str(tmp_path)), None, request("mola")],
        use_tqdm=False,
    )
    void, plain, mixed = (tuple(output.outputs[0].token_ids) for output in outputs)
    assert void != base.greedy
    assert plain == base.greedy
    assert mixed == mola.greedy


def test_the_benchmark_leaves_out_what_takes_too_long_and_tells_how_far_it_is(
    llm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = Workload(2, 16, 48), Workload(1, 16, 1)
    turns = Measurements(repetitions=2, budget=0.0)
    turns.take({MOLEHILL: llm}, {"base": [None]}, [Contestant("base", MOLEHILL)], [long, short])
    # Nothing stops what is done with its first step.
    assert [(s.workload, s.repetition) for s in turns.samples] == [(short.name, 0), (short.name, 1)]
    said = "stopped in repetition -1, 2 x (16 + 48) tokens take more than 0 s"
    assert turns.stopped == {("base", long.name): f"base, {long.name}: {said}"}
    lines = [line.split()[1:3] for line in capsys.readouterr().err.splitlines()]
    expected = [["warm-up", "decode"], ["warm-up", "prefill"], ["0", "prefill"], ["1", "prefill"]]
    assert [line for line in lines if line in expected] == expected


def test_requests_that_arrive_one_by_one_have_all_their_tokens_in_time(llm: Any) -> None:
    """A mixture's and the base's, by turns."""
    turns = Measurements(repetitions=1, budget=60.0)
    arriving = Workload(6, 16, 4, rate=50.0)
    loras = {"both": [request("mixlora"), None]}
    turns.take({MOLEHILL: llm}, loras, [Contestant("both", MOLEHILL)], [arriving])
    stats = {sample.figure: sample.value for sample in turns.samples}
    assert list(stats) == ["ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"]
    assert 0 < stats["ttft_p50_ms"] <= stats["ttft_p99_ms"]
    assert 0 < stats["itl_p50_ms"] <= stats["itl_p99_ms"]
