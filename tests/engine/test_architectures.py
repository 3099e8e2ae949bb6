"""Base models of many architectures, each with adapters of several methods in one mixed batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import asking
from support.architectures import ARCHITECTURES, STEPS, make
from support.asking import ask, assert_golden
from support.engines import engine
from support.golden import Prompt


@dataclass
class Served:
    """An engine, its adapters by name, and what the oracle says of every prompt."""

    llm: Any
    adapters: dict[str, Path]
    prompts: list[Prompt]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(tmp_path_factory: Any, request: Any) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp(request.param)
    path, adapters, prompts = make(request.param, directory)
    with engine(model=str(path), enforce_eager=True) as llm:
        for name in adapters:
            llm.llm_engine.add_lora(asking.request(name, adapters))
        yield Served(llm, adapters, prompts)


def test_base_and_adapters_in_one_batch_match_the_oracle(served: Served) -> None:
    mixed = sorted(served.prompts, key=lambda prompt: len(prompt.ids))
    assert_golden(ask(served.llm, mixed, STEPS, others=served.adapters), mixed)
