"""Follows the steps of either of vLLM's model runners: their requests, and the order of their rows.

Which requests a step has is in the scheduler's output; in which order they lie in it is known where
the model runner asks for the mapping of rows to adapters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class StepFollower(Protocol):
    """Told of every step, first `follow`, then `lay_out`."""

    def follow(self, step: Any) -> None:
        """step: vLLM's SchedulerOutput."""

    def lay_out(self, request_ids: Sequence[str], num_tokens: Sequence[int]) -> None:
        """In which order, and with how many rows each, requests lie in the step."""


def follow_steps(runner: Any, follower: StepFollower) -> None:
    """runner: vLLM's model runner, whose steps are followed from now on."""
    runner.execute_model = _following(runner.execute_model, follower)
    if hasattr(runner, "lora_state"):
        state = runner.lora_state
        state.make_lora_inputs = _laying_out_v2(state.make_lora_inputs, follower)
    else:
        runner.set_active_loras = _laying_out_v1(runner.set_active_loras, follower)


def _following(execute_model: Callable[..., Any], follower: StepFollower) -> Callable[..., Any]:
    @functools.wraps(execute_model)
    def following(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        follower.follow(scheduler_output)
        return execute_model(scheduler_output, *args, **kwargs)

    return following


def _laying_out_v1(
    set_active_loras: Callable[..., None], follower: StepFollower
) -> Callable[..., None]:
    @functools.wraps(set_active_loras)
    def laying_out(input_batch: Any, num_scheduled_tokens: Any, *args: Any, **more: Any) -> None:
        follower.lay_out(input_batch.req_ids, num_scheduled_tokens)
        set_active_loras(input_batch, num_scheduled_tokens, *args, **more)

    return laying_out


def _laying_out_v2(
    make_lora_inputs: Callable[..., Any], follower: StepFollower
) -> Callable[..., Any]:
    @functools.wraps(make_lora_inputs)
    def laying_out(req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        follower.lay_out(req_ids, num_scheduled_tokens)
        return make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)

    return laying_out


def computed_tokens(step: Any) -> dict[str, int]:
    """How many tokens of each request of a SchedulerOutput are computed before it."""
    cached = step.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=False))
    computed.update((new.req_id, new.num_computed_tokens) for new in step.scheduled_new_reqs)
    return computed
