"""Memory for adapters: a budget that is held to, and nothing left behind by loading."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import big_adapter
from support.asking import IDS, ask, ask_worker, assert_golden
from support.engines import engine
from support.golden import Case
from support.limits import limited

from molehill.engine.vllm import protocol

MEBIBYTE = 1 << 20
BUDGET = 60 * MEBIBYTE
# By their number of experts: one of no budget, one of most of it, two of which fit.
HUGE, LARGE, MEDIUM = 64, 32, 16


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine(additional_config={"molehill": {"memory": BUDGET}}) as llm:
        yield llm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> dict[int, Path]:
    """Adapters by their number of experts."""
    folder = Path(tmp_path_factory.mktemp("adapters"))
    for experts in (HUGE, LARGE, MEDIUM):
        big_adapter.save(folder / str(experts), experts)
    return {experts: folder / str(experts) for experts in (HUGE, LARGE, MEDIUM)}


def load(llm: Any, lora_id: int, path: Path) -> None:
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(f"{path.name}-{lora_id}", lora_id, str(path)))


def worker(llm: Any) -> psutil.Process:
    """The engine's only process that has none below it: it holds the model."""
    (core,) = llm.llm_engine.engine_core.resources.engine_manager.processes
    below = psutil.Process(core.pid).children(recursive=True)
    (leaf,) = [process for process in below if not process.children()]
    return leaf


def assert_serves(llm: Any) -> None:
    prompts = Case("mola").prompts
    assert_golden(ask(llm, prompts), prompts)
    llm.llm_engine.remove_lora(IDS["mola"])


def test_an_adapter_over_the_budget_is_refused_and_others_serve(
    llm: Any, saved: dict[int, Path]
) -> None:
    with pytest.raises(Exception, match=rf"memory: found \d+ bytes, expected at most {BUDGET}"):
        load(llm, 50, saved[HUGE])
    assert 50 not in llm.llm_engine.list_loras()
    assert_serves(llm)


def install(llm: Any, path: Path) -> str:
    """As the API does; why it was refused, or nothing."""
    asked = protocol.InstallRequest("m", 51, str(path))
    return ask_worker(llm, protocol.INSTALL, asked).refusal


def test_a_copy_that_finds_no_memory_leaves_nothing_and_others_serve(
    llm: Any, saved: dict[int, Path]
) -> None:
    """It was read while the budget was taken, so that its copy is made between two steps."""
    path, process = saved[LARGE], worker(llm)

    def refuse() -> None:
        load(llm, 52, saved[MEDIUM])
        asked = protocol.AdapterRequest(51, str(path))
        ask_worker(llm, protocol.PREPARE, asked)
        while not ask_worker(llm, protocol.PREPARED, asked).done:
            time.sleep(0.01)
        llm.llm_engine.remove_lora(52)
        with limited(process.pid, resource.RLIMIT_AS, process.memory_info().vms):
            assert "expected memory to be had" in install(llm, path)
        assert 51 not in llm.llm_engine.list_loras()
        assert_serves(llm)

    refuse()
    before = process.memory_info().rss
    for _ in range(3):
        refuse()
    # What was read alone has 43 MiB.
    assert process.memory_info().rss - before < 43 * MEBIBYTE
    assert install(llm, path) == ""
    assert_serves(llm)
    llm.llm_engine.remove_lora(51)


def fill(llm: Any, path: Path) -> list[int]:
    """Loads until the budget is spent; the ids that were taken."""
    loaded: list[int] = []
    while len(loaded) < 20:
        lora_id = 60 + len(loaded)
        try:
            load(llm, lora_id, path)
        except Exception as error:
            if "adapter memory" not in str(error):
                raise
            return loaded
        loaded.append(lora_id)
    raise AssertionError("the budget is never spent")


def test_unloading_makes_room_again(llm: Any, saved: dict[int, Path]) -> None:
    first = fill(llm, saved[MEDIUM])
    assert len(first) == 2
    for lora_id in first:
        llm.llm_engine.remove_lora(lora_id)
    second = fill(llm, saved[MEDIUM])
    assert second == first
    for lora_id in second:
        llm.llm_engine.remove_lora(lora_id)


def test_many_loads_and_unloads_leave_no_memory_behind(llm: Any) -> None:
    def cycle(times: int) -> None:
        for _ in range(times):
            for lora_id, case in ((81, "dynmole-k1"), (82, "mixlora"), (83, "lora")):
                load(llm, lora_id, Case(case).path)
            for lora_id in (82, 81, 83):
                llm.llm_engine.remove_lora(lora_id)

    cycle(10)
    before = worker(llm).memory_info().rss
    cycle(40)
    # 40 leaked copies of these three adapters would be some 8 MiB.
    assert worker(llm).memory_info().rss - before < 4 * MEBIBYTE
