"""A request for an activated adapter whose prompt does not activate it."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs
from support.golden import TINY_LLAMA
from support.world import Play, World, adapter
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import embeds_input, tokens_input
from vllm.sampling_params import SamplingParams

from molehill.api.adapters.errors import NotActivatedError
from molehill.api.adapters.source import Source
from molehill.api.http import schemas
from molehill.api.sources.manifest import Entry, Manifest, ManifestError
from molehill.api.vllm import invocation
from molehill.api.vllm.probe import PROMPT_TOKENS, SHORT_TOKENS, Prober
from molehill.engine.formats import native

TOKENS = (301, 17, 302)
WITH, WITHOUT = [5, *TOKENS, 6], [5, 301, 17, 6, 302]


def activated(w: World, seed: int = 1) -> Source:
    directory = w.folder / f"activated-{seed}"
    native.write(replace(adapter(seed), invocation_tokens=TOKENS), directory)
    return Source(directory, f"label-{seed}")


def ask(w: World, prompt: Any, request_id: str = "id", params: Any = None) -> Any:
    return w.engine.generate(prompt, params, request_id, lora_request=w.served["a"])


def outcomes(w: World) -> dict[str, int]:
    result = Counter[str]()
    for metric in w.registry.events.collect():
        for sample in metric.samples:
            if sample.name == "molehill_requests_not_invoked_total":
                result[sample.labels["outcome"]] += int(sample.value)
    return dict(result)


def test_a_prompt_that_activates_it_is_answered(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", activated(w))
        for prompt in (tokens_input(WITH), {"prompt_token_ids": list(TOKENS)}):
            assert [output async for output in ask(w, prompt)] == ["first", "last"]
        assert w.engine.served == [1, 1]
        assert outcomes(w) == {"base": 0, "refused": 0}

    play(scenario)


@pytest.mark.parametrize(
    "prompt", [tokens_input(WITHOUT), tokens_input([]), "text", embeds_input([])], ids=str
)
def test_others_are_refused_before_the_engine_is_asked(play: Play, prompt: Any) -> None:
    async def scenario(w: World) -> None:
        generation = (await w.load("a", activated(w))).generation
        engine: Any = w.engine
        engine.tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        with pytest.raises(VLLMValidationError, match=r"\[301, 17, 302\]") as refused:
            ask(w, prompt)
        assert refused.value.parameter == "prompt"
        text = engine.tokenizer.decode(list(TOKENS))
        assert text
        assert repr(text) in str(refused.value)
        assert w.engine.served == []
        assert generation.status.in_flight == 0
        assert outcomes(w) == {"base": 0, "refused": 1}

    play(scenario)


def test_a_beam_search_is_refused(play: Play) -> None:
    """As in PEFT: its later prompts hold what it generated, which is not to be searched."""

    async def scenario(w: World) -> None:
        await w.load("a", activated(w))
        beam = SamplingParams(max_tokens=1, detokenize=False)
        with pytest.raises(VLLMValidationError, match="beam search"):
            ask(w, tokens_input(WITH), "cmpl-1-0123456789abcdef-beam-0", beam)
        # A client chooses ids, and no beams by them.
        ask(w, tokens_input(WITH), "cmpl-1-0123456789abcdef-beam-0", SamplingParams())

    play(scenario)


def test_the_base_answers_where_the_load_said_so(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        source = activated(w)
        generation = (await w.load("a", source, when_not_invoked="base")).generation
        stream = ask(w, tokens_input(WITHOUT))
        assert generation.status.in_flight == 1
        assert [output async for output in stream] == ["first", "last"]
        assert [output async for output in ask(w, tokens_input(WITH))] == ["first", "last"]
        assert w.engine.served == [0, 1]
        assert (generation.status.in_flight, generation.status.running) == (0, 0)
        assert outcomes(w) == {"base": 1, "refused": 0}

    play(scenario)


def test_the_same_bytes_again_change_what_becomes_of_such_prompts(play: Play) -> None:
    async def scenario(w: World) -> None:
        source = activated(w)
        first = (await w.load("a", source)).generation
        assert schemas.of_generation(w.registry, first).when_not_invoked == "refuse"
        assert schemas.of_generation(w.registry, first).alora_invocation_tokens == list(TOKENS)
        again = await w.load("a", source, when_not_invoked="base")
        assert (again.status, again.generation) == ("unchanged", first)
        assert (await w.load("a", source)).generation.status.when_not_invoked == "base"
        # Other weights under the name take it over.
        other = (await w.load("a", activated(w, 2), replace=True)).generation
        assert other.status.when_not_invoked == "base"

    play(scenario)


def test_an_adapter_that_acts_on_every_token_has_nothing_to_say_of_it(play: Play) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(NotActivatedError, match="no alora_invocation_tokens"):
            await w.load("a", 1, when_not_invoked="base")
        assert (w.served, w.in_store()) == ({}, [])
        info = schemas.of_generation(w.registry, (await w.load("a", 1)).generation)
        assert (info.when_not_invoked, info.alora_invocation_tokens) == (None, None)

    play(scenario)


def test_the_manifest_remembers_it(tmp_path: Path) -> None:
    entries = [Entry("a", "0" * 64, "a", "", False, when_not_invoked="base")]
    Manifest(tmp_path).write(entries)
    assert Manifest(tmp_path).read()[0].not_invoked == "base"
    Manifest(tmp_path).write([structs.replace(entries[0], when_not_invoked="sometimes")])
    with pytest.raises(ManifestError, match="when_not_invoked"):
        Manifest(tmp_path).read()


def test_the_probe_activates_what_it_probes() -> None:
    prompts: list[list[int]] = []

    async def generate(prompt: Any, *_: Any, lora_request: Any) -> Any:
        prompts.append(prompt["prompt_token_ids"])
        logprob = 0.0 if lora_request is None else -1.0
        yield SimpleNamespace(prompt_logprobs=[{1: SimpleNamespace(logprob=logprob)}])

    content = SimpleNamespace(invocation_tokens=TOKENS, probe_tokens=())
    generation: Any = SimpleNamespace(name="a", request=object(), content=content)
    asyncio.run(Prober(generate, PROMPT_TOKENS)(generation))
    assert prompts == [[*TOKENS, *range(SHORT_TOKENS)]] * 2


def test_words_of_ids_that_the_vocabulary_lacks() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            raise OverflowError

    assert invocation.decoder(SimpleNamespace(tokenizer=Tokenizer()))(TOKENS) == ""
    assert invocation.decoder(SimpleNamespace(tokenizer=None))(TOKENS) == ""
