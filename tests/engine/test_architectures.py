"""Base models of many architectures, each with adapters of several methods in one mixed batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from architectures import ARCHITECTURES, STEPS, make
from asking import ask, assert_golden
from engines import engine
from golden import Prompt


@dataclass
class Served:
    """An engine, the adapters' requests by name, and what the oracle says of every prompt."""

    llm: Any
    requests: dict[str, Any]
    prompts: list[Prompt]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: Any, tmp_path_factory: Any) -> Iterator[Served]:
    from vllm.lora.request import LoRARequest

    directory = tmp_path_factory.mktemp(request.param)
    path, adapters, prompts = make(request.param, directory)
    with engine(model=str(path), enforce_eager=True) as llm:
        requests: dict[str, Any] = {"base": None}
        for i, (name, adapter) in enumerate(adapters.items()):
            requests[name] = LoRARequest(name, i + 1, str(adapter))
            llm.llm_engine.add_lora(requests[name])
        yield Served(llm, requests, prompts)


def test_base_and_adapters_in_one_batch_match_the_oracle(served: Served) -> None:
    mixed = sorted(served.prompts, key=lambda prompt: len(prompt.ids))
    assert_golden(ask(served.llm, mixed, STEPS, requests=served.requests), mixed)
