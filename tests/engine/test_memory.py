"""Memory for adapters: a budget that is held to, and nothing left behind by loading."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from asking import IDS, ask, assert_golden
from engines import engine
from golden import Case

BUDGET = 700_000
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine(additional_config={"molehill": {"memory": BUDGET}}) as llm:
        yield llm


def load(llm: Any, lora_id: int, case: str) -> None:
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(f"{case}-{lora_id}", lora_id, str(Case(case).path)))


def workers_bytes() -> int:
    """Resident memory of this process's vLLM workers."""
    children = psutil.Process().children(recursive=True)
    return sum(child.memory_info().rss for child in children)


def test_an_adapter_over_the_budget_is_refused_and_others_serve(llm: Any) -> None:
    with pytest.raises(Exception, match=r"memory: found \d+ bytes, expected at most 700000"):
        load(llm, 50, "dynmole-default")
    assert 50 not in llm.llm_engine.list_loras()
    prompts = Case("mola").prompts
    assert_golden(ask(llm, prompts), prompts)
    llm.llm_engine.remove_lora(IDS["mola"])


def fill(llm: Any) -> list[int]:
    """Loads until the budget is spent; the ids that were taken."""
    loaded: list[int] = []
    while len(loaded) < 20:
        lora_id = 60 + len(loaded)
        try:
            load(llm, lora_id, "dynmole-renyi")
        except Exception as error:
            if "adapter memory" not in str(error):
                raise
            return loaded
        loaded.append(lora_id)
    raise AssertionError("the budget is never spent")


def test_unloading_makes_room_again(llm: Any) -> None:
    first = fill(llm)
    assert first
    for lora_id in first:
        llm.llm_engine.remove_lora(lora_id)
    second = fill(llm)
    assert second == first
    for lora_id in second:
        llm.llm_engine.remove_lora(lora_id)


def test_many_loads_and_unloads_leave_no_memory_behind(llm: Any) -> None:
    def cycle(times: int) -> None:
        for _ in range(times):
            for lora_id, case in ((81, "dynmole-k1"), (82, "mixlora"), (83, "lora")):
                load(llm, lora_id, case)
            for lora_id in (82, 81, 83):
                llm.llm_engine.remove_lora(lora_id)

    cycle(50)
    before = workers_bytes()
    cycle(300)
    # 300 leaked copies of these three adapters would be some 60 MiB.
    assert workers_bytes() - before < 20 * MEBIBYTE
