"""Base models of many architectures, each with adapters of several methods in one mixed batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import asking, tiny_models, vocabulary
from support.architectures import ARCHITECTURES, EXTRA_VOCAB, STEPS, make
from support.asking import LOGIT_TOLERANCE, ask, assert_golden
from support.engines import engine
from support.golden import VOCABULARY, Prompt, greatest_difference

from molehill.engine import formats
from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.engine.vllm.settings import Settings

# Tokens of the prompts whose every logit is compared.
SHORT = 20


@dataclass
class Served:
    """An engine, its adapters by name, and what the oracle says of every prompt."""

    llm: Any
    base: Path
    adapters: dict[str, Path]
    prompts: list[Prompt]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(tmp_path_factory: Any, request: Any) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp(request.param)
    path, adapters, prompts = make(request.param, directory)
    grown = {}
    if not vocabulary.GROWN.keys().isdisjoint(adapters):
        settings = Settings(extra_vocab=EXTRA_VOCAB)
        grown = {
            "additional_config": settings.to_config(),
            "hf_overrides": {"vocab_size": VOCABULARY + EXTRA_VOCAB},
        }
    with engine(model=str(path), enforce_eager=True, **grown) as llm:
        for name in adapters:
            llm.llm_engine.add_lora(asking.request(name, adapters))
        yield Served(llm, path, adapters, prompts)


def test_base_and_adapters_in_one_batch_match_the_oracle(served: Served) -> None:
    mixed = sorted(served.prompts, key=lambda prompt: len(prompt.ids))
    assert_golden(ask(served.llm, mixed, STEPS, others=served.adapters), mixed)
    answered = {p.case for p in mixed if max(p.greedy) >= VOCABULARY}
    assert answered == answered & vocabulary.GROWN.keys()
    assert answered or vocabulary.GROWN.keys().isdisjoint(served.adapters)


def test_logits_of_prompts_know_whose_rows_they_are(served: Served) -> None:
    """Of all prompts of one batch, those of adapters on the head among them."""
    names = [name for name in served.adapters if name in vocabulary.HEADS]
    if not names:
        pytest.skip("this architecture is asked without an adapter on the head")
    cases = ("base", "lora", *names)
    prompts = [p for p in served.prompts if p.case in cases and len(p.ids) < SHORT]
    served.llm.reset_prefix_cache()
    replies = ask(served.llm, prompts, 1, prompt_logits=True, others=served.adapters)
    model = tiny_models.load(served.base)
    for name in ("base", *names):
        adapter = Adapter("base", {})
        if name != "base":
            base = replace(base_model(served.base), extra_tokens=EXTRA_VOCAB)
            adapter = formats.read(served.adapters[name], base=base)
        answers = [(p, r) for p, r in zip(prompts, replies, strict=True) if p.case == name]
        for prompt, reply in answers:
            with attach(model, adapter), torch.no_grad():
                expected = model(torch.tensor([prompt.ids]), use_cache=False).logits[0, :-1]
            assert reply.prompt_logits is not None
            assert greatest_difference(reply.prompt_logits, expected) < LOGIT_TOLERANCE
