"""What a request may ask for, of an adapter, in one batch with the base's and others' requests.

Steps take 16 tokens, four requests run at a time, and who goes first is said by priorities.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.asking import LOGIT_TOLERANCE, Reply, ask, ask_each, assert_golden, request
from support.engines import engine
from support.golden import Case, Prompt

CASES = ("base", "dynmole-default", "mixlora", "mola", "lora")
MIXTURE = "dynmole-default"
# Of a case's prompts, the only one that fills a block, of 32.
LONGEST = 3
TOKENS = 12
NEVER = -100.0


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    options = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "scheduling_policy": "priority",
    }
    with engine(**options) as llm:
        yield llm


def sampling(**more: Any) -> Any:
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**settings, **more})


def ids(prompt: Prompt) -> dict[str, Any]:
    return {"prompt_token_ids": list(prompt.ids)}


def test_steps_of_16_tokens(llm: Any) -> None:
    prompts = [Case(case).prompts[i] for i in range(4) for case in CASES]
    assert max(len(prompt.ids) for prompt in prompts) > 2 * 16
    assert_golden(ask(llm, prompts), prompts)


def test_samples_of_an_adapter_and_of_the_base(llm: Any) -> None:
    counts = {MIXTURE: 3, "base": 2, "mixlora": 1}
    prompts = [Case(case).prompts[1] for case in counts]
    # Among one candidate, sampling is greedy; vLLM refuses n > 1 at temperature 0.
    parameters = [sampling(n=n, temperature=1, top_k=1) for n in counts.values()]
    outputs = llm.generate(
        [ids(prompt) for prompt in prompts],
        parameters,
        lora_request=[request(case) for case in counts],
        use_tqdm=False,
    )
    for prompt, output, n in zip(prompts, outputs, counts.values(), strict=True):
        assert [tuple(one.token_ids) for one in output.outputs] == [prompt.greedy] * n


def test_biased_logits_are_the_adapters_and_nobody_elses(llm: Any) -> None:
    """The best token is forbidden to two of four requests, which give their second best."""
    prompts = [Case(case).prompts[1] for case in (MIXTURE, "base") for _ in range(2)]
    biases = {i: {"logit_bias": {prompts[i].greedy[0]: NEVER}} for i in (0, 2)}
    replies = ask_each(
        llm, [list(p.ids) for p in prompts], [request(p.case) for p in prompts], extra=biases
    )
    assert_golden([replies[1], replies[3]], [prompts[1], prompts[3]])
    for i in biases:
        best = prompts[i].logits.topk(3)
        assert best.values.diff().abs().min() > 2 * LOGIT_TOLERANCE
        assert prompts[i].greedy[0] == best.indices[0]
        assert replies[i].tokens[0] == best.indices[1]


def test_a_salt_separates_what_requests_of_one_adapter_have_read(llm: Any) -> None:
    assert llm.reset_prefix_cache()
    cached = []
    for case, salt in (
        (MIXTURE, "x"),
        ("base", "x"),
        (MIXTURE, "x"),
        (MIXTURE, "y"),
        ("base", "x"),
    ):
        prompt = Case(case).prompts[LONGEST]
        salted = {**ids(prompt), "cache_salt": salt}
        (output,) = llm.generate(salted, sampling(), lora_request=request(case), use_tqdm=False)
        assert tuple(output.outputs[0].token_ids) == prompt.greedy
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 32, 0, 32]


def add(llm: Any, number: int, prompt: Prompt, priority: int = 0) -> str:
    """The id of a request that now waits."""
    name = f"{number}-{prompt.case}"
    llm.llm_engine.add_request(
        name, ids(prompt), sampling(), lora_request=request(prompt.case), priority=priority
    )
    return name


def finish(llm: Any) -> dict[str, tuple[int, ...]]:
    """Tokens by request, in the order in which they end."""
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = tuple(output.outputs[0].token_ids)
    return done


def greedy(names: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, tuple[int, ...]]:
    return {name: prompt.greedy for name, prompt in zip(names, prompts, strict=True)}


def test_who_has_priority_ends_first_whatever_adapter_it_has(llm: Any) -> None:
    """The last two of eight that wait until all are there, of which four run at a time."""
    cases = ("base", "lora", "mola", "base", "lora", "mixlora", MIXTURE, "base")
    prompts = [Case(case).prompts[1] for case in cases]
    urgent = 2
    priorities = [5] * (len(prompts) - urgent) + [0] * urgent
    # Requests are taken, and none is scheduled.
    llm.sleep(level=0)
    names = [
        add(llm, i, prompt, priority)
        for i, (prompt, priority) in enumerate(zip(prompts, priorities, strict=True))
    ]
    llm.wake_up(tags=["scheduling"])
    done = finish(llm)
    assert done == greedy(names, prompts)
    assert set(list(done)[:urgent]) == set(names[-urgent:])


def test_a_request_that_is_aborted_disturbs_no_other(llm: Any) -> None:
    prompts = [Case(case).prompts[LONGEST] for case in ("base", MIXTURE, "mixlora")]
    names = [add(llm, i, prompt) for i, prompt in enumerate(prompts)]
    begun: dict[str, int] = {}
    while begun.get(names[1], 0) < 3:
        for output in llm.llm_engine.step():
            begun[output.request_id] = len(output.outputs[0].token_ids)
    assert begun[names[1]] < TOKENS
    llm.llm_engine.abort_request([names[1]])
    assert finish(llm) == greedy([names[0], names[2]], [prompts[0], prompts[2]])
    assert_golden(ask(llm, prompts), prompts)


def test_an_engine_that_slept_has_its_adapters_and_no_prefixes(llm: Any) -> None:
    """On CPU vLLM keeps weights and KV cache where they are: what sleeps is the scheduler."""
    prompts = [Case(case).prompts[LONGEST] for case in CASES]

    def cached(replies: Sequence[Reply]) -> set[int]:
        assert_golden(replies, prompts)
        return {reply.cached for reply in replies}

    ask(llm, prompts)
    assert cached(ask(llm, prompts)) == {32}
    loaded = llm.llm_engine.list_loras()
    llm.sleep(level=1)
    assert llm.llm_engine.is_sleeping()
    llm.wake_up()
    assert not llm.llm_engine.is_sleeping()
    assert llm.llm_engine.list_loras() == loaded
    assert cached(ask(llm, prompts)) == {0}
