"""Activated adapters in the engine: which tokens they act on, and which cached ones they share.

Steps take 24 tokens and blocks 32, so that chunks and blocks cut prompts, and each other, at odd
places; the cache has room for less than a batch, and drafts of an n-gram speculator are verified.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from support import xlora
from support.activated import INVOCATION, OTHER, activate, activate_head, golden_prompts
from support.asking import LOGIT_TOLERANCE, Reply, ask_each, ask_worker, assert_golden
from support.engines import engine
from support.golden import TINY_LLAMA, Case, Prompt, greatest_difference
from support.oracle import answer
from support.routed import asking, assert_chosen, chosen, gate_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.invocation import invocation_offset
from molehill.engine.hf.reference import attach
from molehill.engine.vllm import protocol
from molehill.engine.vllm.settings import Settings

CHUNK, BLOCK = 24, 32
BLOCKS = 14
TEXT = [(37 * i + 11) % 290 + 5 for i in range(120)]

DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def events_endpoint(tmp_path_factory: Any) -> str:
    return f"ipc://{tmp_path_factory.mktemp('events')}/socket"


@pytest.fixture(scope="module")
def llm(events_endpoint: str) -> Iterator[Any]:
    from vllm.config import KVEventsConfig

    options = {
        "kv_events_config": KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint=events_endpoint
        ),
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 6,
        "num_gpu_blocks_override": BLOCKS,
        "speculative_config": DRAFTS,
        "disable_log_stats": False,
        "seed": 0,
        "additional_config": Settings(xlora=True).to_config(),
    }
    with engine(**options) as llm:
        yield llm


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(llm: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """By name; `base` is None."""
    from vllm.lora.request import LoRARequest

    folder = Path(tmp_path_factory.mktemp("activated"))
    paths = {
        "plain": Case("lora").path,
        "alora": Case("alora").path,
        "dynmole": activate("dynmole-default", folder / "dynmole", OTHER),
        "mixlora": activate("mixlora", folder / "mixlora", OTHER),
        "head": activate_head(folder / "head", INVOCATION),
        "xlora": Case("xlora").path,
        "keeping": xlora.non_granular(folder / "keeping", 3),
    }
    result = {
        name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(paths.items(), 1)
    }
    for request in result.values():
        assert llm.llm_engine.add_lora(request)
    return {"base": None, **result}


def invoked(offset: int, invocation: Sequence[int] = INVOCATION, length: int = 80) -> list[int]:
    """A prompt with an invocation at `offset`."""
    return [*TEXT[:offset], *invocation, *TEXT[offset:]][:length]


def expected(model: Any, request: Any, prompt: Sequence[int], steps: int = 8) -> Prompt:
    """By the definition, on the rows from the invocation on."""
    if request is None:
        return answer(model, "base", prompt, steps)
    adapter = formats.read(Path(request.lora_path))
    tokens = adapter.invocation_tokens
    start = invocation_offset(prompt, tokens) if tokens else 0
    assert start is not None
    with attach(model, adapter, start=start, prompt=len(prompt)):
        return answer(model, request.lora_name, prompt, steps)


def assert_as(reply: Reply, prompt: Prompt) -> None:
    assert reply.tokens == prompt.greedy[: len(reply.tokens)], prompt.case
    assert greatest_difference(reply.logits, prompt.logits) <= LOGIT_TOLERANCE, prompt.case


def ask(llm: Any, prompts: Sequence[Sequence[int]], requests: Sequence[Any]) -> list[Reply]:
    return ask_each(llm, [list(prompt) for prompt in prompts], requests, tokens=8)


def test_pefts_answers_to_the_golden_prompts(llm: Any, adapters: dict[str, Any]) -> None:
    """All in one batch, with the base's own answers to the same prompts between them."""
    prompts = [prompt for prompt in golden_prompts() if len(prompt.ids) < 70]
    oracle = {tuple(p["prompt_token_ids"]): p for p in Case("alora").oracle["prompts"]}
    requests = [adapters["alora"], None] * len(prompts)
    ids = [list(prompt.ids) for prompt in prompts for _ in range(2)]
    replies = ask_each(llm, ids, requests, tokens=12)
    for i, prompt in enumerate(prompts):
        assert_as(replies[2 * i], prompt)
        assert list(replies[2 * i + 1].tokens) == oracle[prompt.ids]["base_greedy_token_ids"]


@pytest.fixture(scope="module")
def peft_model() -> Any:
    """Of its own: PEFT changes the model that it is given."""
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, Case("alora").path).eval()


@torch.no_grad()
def pefts_logits(peft_model: Any, prompt: list[int]) -> Tensor:
    result: Tensor = peft_model(torch.tensor([prompt]), use_cache=False).logits[0]
    return result


def test_x_loras_answers_to_the_golden_prompts(llm: Any, adapters: dict[str, Any]) -> None:
    """Between the base's and a LoRA's: each step runs the model twice, for all of them."""
    assert llm.reset_prefix_cache()
    cases = {"xlora": adapters["xlora"], "base": None, "lora": adapters["plain"]}
    every = [Case(case).prompts for case in cases]
    prompts = [prompt for alike in zip(*every, strict=True) for prompt in alike]
    ids = [list(prompt.ids) for prompt in prompts]
    requests = [cases[prompt.case] for prompt in prompts]
    of_it = protocol.RoutingRequest(adapters["xlora"].lora_int_id)
    before = ask_worker(llm, protocol.ROUTING, of_it)
    assert_golden(ask_each(llm, ids, requests, tokens=12), prompts)
    after = ask_worker(llm, protocol.ROUTING, of_it)
    # Each once, whatever ran twice; drafts that were refused count too.
    read = sum(len(prompt.ids) + 11 for prompt in Case("xlora").prompts)
    assert read <= after.tokens - before.tokens < 1.5 * read
    (reply,) = ask_each(llm, ids[:1], requests[:1], tokens=1, prompt_logits=True)
    expected = Case("xlora").tensors["prompt0.logits"]
    assert reply.prompt_logits is not None
    assert greatest_difference(reply.prompt_logits, expected[:-1]) <= LOGIT_TOLERANCE


def test_what_peft_makes_of_other_settings(
    llm: Any, adapters: dict[str, Any], tmp_path: Path
) -> None:
    """Of PEFT's own models, scalings exact and kept, in one batch with the base and LoRAs; then out
    of it again."""
    pytest.importorskip("peft", reason="the dev extra is not installed")
    from vllm.lora.request import LoRARequest

    xlora.save_experts(tmp_path / "experts")
    answers, kept, requests = [], [], {}
    for i, (name, config) in enumerate(xlora.VARIANTS.items()):
        peft_model = xlora.make(tmp_path / "experts", tmp_path / str(i), **config)
        requests[name] = LoRARequest(name, 60 + i, str(tmp_path / str(i)))
        answers.append(answer(peft_model, name, TEXT[i : i + 50], 8))
        for tokens in xlora.KEPT.get(name, ()):
            path = xlora.keep_after(tmp_path / str(i), tmp_path / f"{i}-{tokens}", tokens)
            kept.append(xlora.kept_answer(peft_model, path.name, answers[-1].ids, tokens, 8))
            requests[path.name] = LoRARequest(path.name, 70 + len(kept), str(path))
    for request in requests.values():
        assert llm.llm_engine.add_lora(request)
    golden = [Case(name).prompts[1] for name in ("base", "lora")]
    prompts = [prompt for each in answers for prompt in (each, *golden)]
    everything: list[Any] = [*prompts, *kept]
    asked = [(list(prompt.ids), prompt.case) for prompt in everything]
    by_case = {**requests, "base": None, "lora": adapters["plain"]}
    replies = ask_each(llm, [ids for ids, _ in asked], [by_case[case] for _, case in asked])
    for reply, prompt in zip(replies, prompts, strict=False):
        assert reply.tokens[: len(prompt.greedy)] == prompt.greedy, prompt.case
        assert greatest_difference(reply.logits, prompt.logits) <= LOGIT_TOLERANCE, prompt.case
    xlora.assert_kept(replies[len(prompts) :], kept, {each.ids: each.greedy for each in answers})
    for request in requests.values():
        assert llm.llm_engine.remove_lora(request.lora_int_id)


SHAPES = {
    "first": invoked(0),
    "last": invoked(77),
    "twice": [*invoked(20, length=50), *invoked(9, length=30)],
    "overlapping beginnings": [*TEXT[:21], 301, 17, *INVOCATION, *TEXT[:20]],
    "cut by a block's border": invoked(BLOCK - 1),
    "before a block's border": invoked(BLOCK - 3),
    "behind a block's border": invoked(2 * BLOCK),
    "cut by a chunk's border": invoked(CHUNK - 1),
    "before a chunk's border": invoked(CHUNK - 3),
    "behind a chunk's border": invoked(2 * CHUNK),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_prompt_gives_pefts_logits(
    llm: Any, adapters: dict[str, Any], peft_model: Any, shape: str
) -> None:
    prompt = SHAPES[shape]
    (reply,) = ask_each(llm, [prompt], [adapters["alora"]], tokens=1, prompt_logits=True)
    assert reply.prompt_logits is not None
    result = torch.cat([reply.prompt_logits, reply.logits.unsqueeze(0)])
    assert greatest_difference(result, pefts_logits(peft_model, prompt)) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("shape", ["first", "last", "cut by a chunk's border"])
def test_logits_of_prompts_are_the_heads_from_the_invocation_on(
    llm: Any, adapters: dict[str, Any], model: Any, shape: str
) -> None:
    prompt, request = SHAPES[shape], adapters["head"]
    (reply,) = ask_each(llm, [prompt], [request], tokens=1, prompt_logits=True)
    adapter = formats.read(Path(request.lora_path))
    start = invocation_offset(prompt, INVOCATION)
    assert start is not None
    with attach(model, adapter, start=start), torch.no_grad():
        wanted = model(torch.tensor([prompt]), use_cache=False).logits[0]
    assert reply.prompt_logits is not None
    both = torch.cat([reply.prompt_logits, reply.logits.unsqueeze(0)])
    assert greatest_difference(both, wanted) <= LOGIT_TOLERANCE


def test_base_plain_and_activated_adapters_in_one_batch(
    llm: Any, adapters: dict[str, Any], model: Any
) -> None:
    """Each prompt has both invocations, at other places."""
    prompts = [
        [*invoked(30, length=40 + i), *invoked(12, OTHER, length=30)] for i in range(0, 15, 3)
    ]
    names = [name for name in adapters for _ in range(2)]
    jobs = [(prompts[i % len(prompts)], adapters[name]) for i, name in enumerate(names)]
    replies = ask(llm, [prompt for prompt, _ in jobs], [request for _, request in jobs])
    for reply, (prompt, request) in zip(replies, jobs, strict=True):
        assert_as(reply, expected(model, request, prompt))


# Two whole blocks come before the invocation, and one has it.
BOTH = [*TEXT[:66], *INVOCATION, *TEXT[66:70], *OTHER, *TEXT[70:100]]
FOLLOWERS = {"base": 64, "alora": 64, "dynmole": 64, "mixlora": 64, "plain": 0, "xlora": 0}


@pytest.mark.parametrize("first", ["base", "alora", "dynmole"])
def test_what_one_has_read_before_its_invocation_serves_all_but_plain_adapters(
    llm: Any, adapters: dict[str, Any], model: Any, first: str
) -> None:
    assert llm.reset_prefix_cache()
    (reply,) = ask(llm, [BOTH], [adapters[first]])
    assert reply.cached == 0
    for name, cached in FOLLOWERS.items():
        (reply,) = ask(llm, [BOTH], [adapters[name]])
        # What it has itself computed, from its invocation on, it finds as well.
        assert (name, reply.cached) == (name, 96 if name == first else cached)
        assert_as(reply, expected(model, adapters[name], BOTH))


def test_an_x_loras_blocks_are_its_own(llm: Any, adapters: dict[str, Any], model: Any) -> None:
    """Of others' blocks the second cache is not filled, of its own both are."""
    assert llm.reset_prefix_cache()
    cached = []
    for name in ("base", "xlora", "plain", "xlora", "base"):
        (reply,) = ask(llm, [BOTH], [adapters[name]])
        cached.append(reply.cached)
        assert_as(reply, expected(model, adapters[name], BOTH))
    assert cached == [0, 0, 0, 96, 96]


def test_an_answer_with_kept_scalings_is_no_prefix_of_another_request(
    llm: Any, adapters: dict[str, Any], model: Any
) -> None:
    """Asked on, its tokens have scalings of their own; those before them are found."""
    assert llm.reset_prefix_cache()
    asked = [*BOTH, *TEXT[100:120]]
    assert len(asked) == 4 * BLOCK - 3
    (reply,) = ask_each(llm, [asked], [adapters["keeping"]], tokens=40)
    assert_as(reply, expected(model, adapters["keeping"], asked, steps=40))
    # Three tokens of the answer fill a block, and have their own.
    for length, cached in ((40, 128), (40, 160), (3, 96), (4, 128)):
        prompt = [*asked, *reply.tokens[:length]]
        (again,) = ask(llm, [prompt], [adapters["keeping"]])
        assert (length, again.cached) == (length, cached)
        assert_as(again, expected(model, adapters["keeping"], prompt))


def test_a_salt_separates_what_is_the_bases_too(llm: Any, adapters: dict[str, Any]) -> None:
    from vllm import SamplingParams

    assert llm.reset_prefix_cache()
    ask(llm, [BOTH], [None])
    sampling = SamplingParams(temperature=0, max_tokens=1)
    cached = []
    for salt, request in (("x", adapters["alora"]), ("x", None), ("y", adapters["alora"])):
        prompt = {"prompt_token_ids": BOTH, "cache_salt": salt}
        (output,) = llm.generate([prompt], sampling, lora_request=request, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 64, 0]


def test_kv_events_name_an_adapter_from_its_invocation_on(
    llm: Any, adapters: dict[str, Any], events_endpoint: str
) -> None:
    """As subscribers of vLLM's publisher see them."""
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.connect(events_endpoint)
        events.subscribe("")
        # A subscriber gets nothing that was sent before the publisher knew of it.
        for first in range(5, 105):
            ask_each(llm, [[first, *TEXT[:40]]], [None], tokens=1)
            if events.poll(200):
                break
        for first, name in enumerate(("alora", "plain", "base"), 200):
            prompt = [first, *BOTH[1:]]
            ask_each(llm, [prompt], [adapters[name]], tokens=1)
            before, after = {"base": (None, None), "alora": (None, name)}.get(name, (name, name))
            assert stored_blocks(events, prompt[:BLOCK], 3) == [
                (prompt[i : i + BLOCK], before if i < 64 else after) for i in (0, 32, 64)
            ]


def stored_blocks(events: Any, first: list[int], number: int) -> list[tuple[list[int], str | None]]:
    """Tokens and adapter of so many blocks, from the one with the tokens `first` on."""
    result: list[tuple[list[int], str | None]] = []
    while len(result) < number:
        assert events.poll(60_000), result
        *_, batch = events.recv_multipart()
        for event in msgspec.msgpack.decode(batch)[1]:
            if event["type"] != "BlockStored":
                continue
            tokens = event["token_ids"]
            blocks = [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]
            for block in blocks:
                if result or block == first:
                    result.append((block, event.get("lora_name")))
    return result


def test_other_weights_under_the_name_keep_what_is_the_bases(
    llm: Any, adapters: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    path = activate("alora", tmp_path / "other", INVOCATION, lora_alpha=2)
    assert llm.reset_prefix_cache()
    ask(llm, [BOTH], [adapters["alora"]])
    other = LoRARequest("alora", 50, str(path))
    assert llm.llm_engine.add_lora(other)
    (reply,) = ask(llm, [BOTH], [other])
    assert llm.llm_engine.remove_lora(50)
    assert reply.cached == 64
    wanted = expected(model, other, BOTH)
    assert_as(reply, wanted)
    assert greatest_difference(wanted.logits, expected(model, adapters["alora"], BOTH).logits) > 0.1


@torch.no_grad()
def test_samples_of_one_prompt(llm: Any, adapters: dict[str, Any], model: Any) -> None:
    """Whatever was drawn, its logits are those of the adapter from the invocation on."""
    from vllm import SamplingParams

    sampling = SamplingParams(n=3, max_tokens=8, ignore_eos=True, logprobs=-1)
    request, prompt = adapters["dynmole"], {"prompt_token_ids": BOTH}
    (output,) = llm.generate([prompt], sampling, lora_request=request, use_tqdm=False)
    assert len(output.outputs) == 3
    adapter = formats.read(Path(request.lora_path))
    assert invocation_offset(BOTH, adapter.invocation_tokens) == 73
    for sample in output.outputs:
        ids = [*BOTH, *sample.token_ids]
        with attach(model, adapter, start=73):
            wanted = model(torch.tensor([ids]), use_cache=False).logits[0, len(BOTH) - 1 : -1]
        result = [[row[token].logprob for token in range(len(row))] for row in sample.logprobs]
        assert greatest_difference(torch.tensor(result), wanted) <= LOGIT_TOLERANCE


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_preempted_requests_and_drafts(llm: Any, adapters: dict[str, Any], model: Any) -> None:
    """Blocks for 416 tokens, of which eight requests want 130 each. What routers chose for two of
    them is what the reference's choose for the tokens that were accepted."""
    assert llm.reset_prefix_cache()
    preempted = counter(llm, "vllm:num_preemptions")
    accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    # Four come first, of which the last is preempted first, as its answer is past its 3 tokens.
    names = ["alora", "base", "dynmole", "keeping", "head", "mixlora", "plain", "xlora"]
    prompts = [[*TEXT[i:50], *INVOCATION, *TEXT[i:20], *OTHER, *TEXT[:9]] for i in range(8)]
    requests = [adapters[name] for name in names]
    asked = [names.index(name) for name in ("dynmole", "mixlora")]
    extra = {i: asking(names[i], 200) for i in asked}
    replies = ask_each(llm, prompts, requests, tokens=50, extra=extra)
    for prompt, request, reply in zip(prompts, requests, replies, strict=True):
        assert_as(reply, expected(model, request, prompt, steps=50))
    assert counter(llm, "vllm:num_preemptions") > preempted
    assert counter(llm, "vllm:spec_decode_num_accepted_tokens") > accepted
    for i in asked:
        ids, path = [*prompts[i], *replies[i].tokens[:-1]], Path(requests[i].lora_path)
        start = invocation_offset(prompts[i], OTHER)
        assert start is not None
        weights = gate_weights(model, path, ids, start)
        assert_chosen(chosen(llm, names[i], len(ids)), weights, start)


def test_a_prompt_without_the_invocation_is_not_the_bases_answer(
    llm: Any, adapters: dict[str, Any]
) -> None:
    """molehill's API refuses it; here the outputs are zeroed, and the rest of the batch is not."""
    prompt = TEXT[:70]
    base, absent, again = ask(llm, [prompt] * 3, [None, adapters["alora"], None])
    assert base.tokens == again.tokens
    assert greatest_difference(absent.logits, base.logits) > 0.1
    (warm,) = ask(llm, [prompt], [None])
    assert warm.cached == 64
    assert warm.tokens == base.tokens
