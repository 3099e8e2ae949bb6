"""Adapters as their authors save them through the vLLM engine, in one batch with golden cases."""

from typing import Any

import pytest
import torch
from support.asking import Reply, ask, ask_each, ask_worker, assert_golden, request
from support.golden import TINY_LLAMA, Case, greatest_difference
from support.routed import asking, assert_chosen, chosen, gate_weights
from support.tuners import SERVED
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.formats import native
from molehill.engine.hf.shapes import base_model
from molehill.engine.vllm import protocol

NEIGHBOURS = ("base", "lora", "mixlora", "mola", "dynmole-default")
MADE = (
    "mole-top-k",
    "mole-threshold",
    "adamole",
    "adamole-high",
    "ldmole",
    "arrow",
    "arrow-general",
    "mix",
    "molora",
    "molora-by-token",
    "renamed",
    *SERVED,
)
# Those whose authors' code, or definition, tells what each token was routed to.
ROUTED = (*MADE[:5], "molora")


@pytest.fixture(scope="module")
def paths(authored: Any) -> dict[str, Any]:
    assert set(authored) == set(MADE)
    return {name: made.path for name, made in authored.items()}


@pytest.fixture(scope="module")
def replies(llm: Any, authored: Any, paths: Any) -> dict[str, list[Reply]]:
    """Everything in ONE batch, interleaved so that neighbours in it differ."""
    routed_prompts = {name: list(made.prompts) for name, made in authored.items()}
    cases = {name: Case(name).prompts[:2] for name in NEIGHBOURS} | routed_prompts
    prompts = [prompts[i] for i in range(2) for prompts in cases.values()]
    result: dict[str, list[Reply]] = {}
    for prompt, reply in zip(prompts, ask(llm, prompts, others=paths), strict=True):
        result.setdefault(prompt.case, []).append(reply)
    return result


@pytest.mark.parametrize("name", MADE)
def test_mixed_batch_matches_the_authors(replies: Any, authored: Any, name: str) -> None:
    assert_golden(replies[name], authored[name].prompts)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_their_neighbours_match_the_reference(replies: Any, name: str) -> None:
    assert_golden(replies[name], Case(name).prompts[:2])


@pytest.mark.parametrize("name", ROUTED)
def test_gate_weights_match_the_authors(llm: Any, authored: Any, paths: Any, name: str) -> None:
    llm.reset_prefix_cache()
    ask_worker(llm, protocol.TRACE, protocol.TraceRequest(True))
    ask(llm, authored[name].prompts[:1], tokens=1, others=paths)
    reply = ask_worker(llm, protocol.TRACE, protocol.TraceRequest(False))
    result = {trace.site: trace.weights.tensor() for trace in reply.traces}
    assert result.keys() == authored[name].routes.keys()
    # LD-MoLE divides logits by as little as 0.01, and their rounding with them.
    tolerance = 1e-4 if name == "ldmole" else 1e-5
    for site, weights in authored[name].routes.items():
        assert greatest_difference(result[site], weights) < tolerance, site


def test_rows_by_token_id_beside_a_mixture_that_tells_its_routing(
    llm: Any, authored: Any, paths: Any
) -> None:
    """Both in the same steps; the other has a bill of the adapters that its tokens had."""
    name, case = "molora-by-token", "dynmole-default"
    prompts = [*Case(case).prompts[:2], *authored[name].prompts[:2]]
    requests = [request(case)] * 2 + [request(name, paths)] * 2
    ids = [list(prompt.ids) for prompt in prompts]
    extra = {i: asking(f"{i}", 100) for i in (1, 3)}
    assert_golden(ask_each(llm, ids, requests, extra=extra), prompts)
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    read = [*prompts[1].ids, *prompts[1].greedy[:-1]]
    assert_chosen(chosen(llm, "1", len(read)), gate_weights(model, Case(case).path, read))
    read = [*prompts[3].ids, *prompts[3].greedy[:-1]]
    part = protocol.TokenRange(0, len(read), len(read))
    asked = protocol.RoutesRequest("3", (part,), usage=True, forget=True)
    usage = ask_worker(llm, protocol.ROUTES, asked).usage
    by_token = formats.read(paths[name], base=base_model(TINY_LLAMA)).by_token
    assert by_token is not None
    had = int((by_token.of(torch.tensor(read)) >= 0).sum())
    assert (usage.tokens, usage.decisions, usage.activated) == (len(read), len(read), had)
    assert usage.flops > 0 < had


@pytest.mark.parametrize("name", MADE)
def test_the_native_copy_answers_the_same(
    llm: Any, authored: Any, tmp_path: Any, name: str
) -> None:
    """Unloads the authors' directory and loads what `molehill convert` would make of it."""
    path = tmp_path / "native"
    native.write(formats.read(authored[name].path, base=base_model(TINY_LLAMA)), path)
    prompts, copy = authored[name].prompts, request(name, {name: path})
    llm.llm_engine.remove_lora(copy.lora_int_id)
    llm.llm_engine.add_lora(copy)
    llm.reset_prefix_cache()
    assert_golden(ask(llm, prompts, others={name: path}), prompts)
    assert llm.llm_engine.remove_lora(copy.lora_int_id)


def test_a_broken_adapter_is_refused_and_nothing_else_is_disturbed(
    llm: Any, authored: Any, paths: Any, edited: Any
) -> None:
    from vllm.lora.request import LoRARequest

    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_threshold.bias"
    broken = edited(authored["adamole"].path, tensors={name: None})
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.q_proj\.lora_threshold\.bias"):
        llm.llm_engine.add_lora(LoRARequest("broken", 99, str(broken)))
    assert 99 not in llm.llm_engine.list_loras()
    prompts = authored["adamole"].prompts
    assert_golden(ask(llm, prompts, others=paths), prompts)
