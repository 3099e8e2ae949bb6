"""Which rows of a step come before their request's invocation, for both of vLLM's model runners."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.lora_utils import LoraState

from molehill.engine.vllm.invocation_rows import InvocationRows, PlainRows

INVOCATION = (301, 17)
# By the adapter's id; 3 is not here.
INVOCATIONS = {1: INVOCATION, 2: ()}
PROMPT = [*range(10), *INVOCATION, *range(5)]


class Runner:
    """As much of a model runner as is followed: a step's requests in an order of their own."""

    def __init__(self, second: bool) -> None:
        self.seen: list[Any] = []
        if second:
            self.lora_state = LoraState(max_num_reqs=8)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        self.seen.append(scheduler_output)
        return "output"

    def set_active_loras(
        self, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None
    ) -> None:
        self.seen.append(input_batch.req_ids)


def new(name: str, lora_id: int | None, computed: int = 0, prompt: Any = PROMPT) -> NewRequestData:
    lora = None if lora_id is None else LoRARequest(f"a{lora_id}", lora_id, "path")
    return NewRequestData(name, prompt, [], None, None, ([],), computed, lora)


def step(
    fresh: Sequence[NewRequestData] = (),
    cached: Mapping[str, int] | None = None,
    finished: Sequence[str] = (),
) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = list(fresh)
    running = CachedRequestData.make_empty()
    running.req_ids, running.num_computed_tokens = list(cached or {}), list((cached or {}).values())
    output.scheduled_cached_reqs = running
    output.finished_req_ids = set(finished)
    return output


class Followed:
    def __init__(self, second: bool = False) -> None:
        self.second, self.runner = second, Runner(second)
        self.rows = InvocationRows(self.runner, INVOCATIONS.get)

    def run(self, output: SchedulerOutput, layout: Mapping[str, int]) -> list[PlainRows]:
        """A step whose requests lie as in `layout`, each with so many rows."""
        assert self.runner.execute_model(output) == "output"
        ids, sizes = list(layout), np.array(list(layout.values()), dtype=np.int32)
        if self.second:
            state = self.runner.lora_state
            state.make_lora_inputs(ids, np.arange(len(ids)), sizes)
        else:
            self.runner.set_active_loras(SimpleNamespace(req_ids=ids), sizes)
        return self.rows.take()


@pytest.fixture(params=[False, True], ids=["first runner", "second runner"])
def followed(request: Any) -> Followed:
    return Followed(request.param)


def test_rows_before_the_invocation_of_requests_that_have_one(followed: Followed) -> None:
    fresh = [new("base", None), new("plain", 2), new("own", 1)]
    result = followed.run(step(fresh), {"own": 17, "base": 17, "plain": 17})
    assert result == [(0, 10, True)]
    assert followed.run(step(cached={"own": 17, "plain": 17}), {"plain": 1, "own": 1}) == []


def test_the_split_lies_inside_before_and_behind_a_chunk(followed: Followed) -> None:
    assert followed.run(step([new("own", 1)]), {"own": 6}) == [(0, 6, True)]
    assert followed.run(step(cached={"own": 6}), {"own": 6}) == [(0, 4, True)]
    assert followed.run(step(cached={"own": 12}), {"own": 5}) == []


def test_tokens_from_the_prefix_cache_have_no_rows(followed: Followed) -> None:
    fresh = [new("a", 1, computed=8), new("b", 1, computed=10), new("c", 1, computed=16)]
    assert followed.run(step(fresh), {"a": 9, "b": 7, "c": 1}) == [(0, 2, True)]


def test_a_preempted_request_begins_anew_under_the_same_offset(followed: Followed) -> None:
    """The second runner gets it as a new request, the first one as a running one."""
    assert followed.run(step([new("own", 1)]), {"own": 17}) == [(0, 10, True)]
    assert followed.run(step(cached={"own": 17}), {"own": 1}) == []
    again = step([new("own", 1)]) if followed.second else step(cached={"own": 0})
    assert followed.run(again, {"own": 20}) == [(0, 10, True)]


def test_drafts_behind_the_prompt_are_the_adapters(followed: Followed) -> None:
    followed.run(step([new("own", 1)]), {"own": 17})
    assert followed.run(step(cached={"own": 17}), {"own": 4}) == []


@pytest.mark.parametrize("prompt", [[1, 2, 3], None])
def test_a_prompt_without_the_invocation_has_no_answer(
    followed: Followed, prompt: list[int] | None, caplog: Any
) -> None:
    assert followed.run(step([new("own", 1, prompt=prompt)]), {"own": 3}) == [(0, 3, False)]
    assert followed.run(step(cached={"own": 3}), {"own": 1}) == [(0, 1, False)]


def test_an_adapter_that_is_not_here_yet_is_asked_for_again(followed: Followed) -> None:
    assert followed.run(step([new("late", 3)]), {"late": 6}) == []
    followed.rows._invocation_of = {3: INVOCATION}.get
    assert followed.run(step(cached={"late": 6}), {"late": 11}) == [(0, 4, True)]


def test_an_id_that_comes_again_is_another_request(followed: Followed) -> None:
    followed.run(step([new("own", 1)]), {"own": 17})
    other = [*INVOCATION, *range(15)]
    result = followed.run(step([new("own", 1, prompt=other)], finished=["own"]), {"own": 17})
    assert result == []
    base = followed.run(step([new("own", None)], finished=["own"]), {"own": 17})
    assert base == []
    assert followed.rows._requests == {}


def test_a_profiling_run_has_no_rows_of_an_earlier_step(followed: Followed) -> None:
    followed.run(step([new("own", 1)]), {"own": 6})
    assert followed.rows.take() == []
