"""Whose rows logits are, for what either of vLLM's model runners computes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from molehill.engine.vllm.logits_rows import LogitsRows
from molehill.kernels.interface import Run

HIDDEN = torch.arange(40.0).view(10, 4)
# Two requests with something on the head, in slots 5 and 7, and rows without between them.
RUNS = [Run(5, 0, 4), Run(7, 6, 10)]


class Model(nn.Module):
    """Its logits are what was announced for them."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: list[Run] = []

    def compute_logits(self, hidden_states: Tensor) -> Any:
        return list(self.announced), hidden_states + 1


class FirstRunner:
    def __init__(self, model: Model) -> None:
        self.model = model

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, rows: list[slice]) -> list[Any]:
        return [self.model.compute_logits(hidden_states[part])[0] for part in rows]


class SecondRunner:
    lora_state = None

    def __init__(self, model: Model) -> None:
        self.model = model

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar: None) -> Any:
        return self.model.compute_logits(hidden_states[input_batch.logits_indices])[0]


class Announced:
    def __init__(self, kind: type) -> None:
        self.model = Model()
        self.runner = kind(self.model)
        self.rows = LogitsRows(self.runner, self.model, self._announce)
        self.rows.begin_step(RUNS, [5, None, 7])

    def _announce(self, runs: Any) -> None:
        self.model.announced = list(runs)


def test_sampled_rows_of_the_first_runner() -> None:
    step = Announced(FirstRunner)
    sampled = HIDDEN[torch.tensor([3, 5, 9])]
    assert step.model.compute_logits(sampled)[0] == [Run(5, 0, 1), Run(7, 2, 3)]
    assert step.model.announced == []


def test_drafts_have_rows_of_their_own() -> None:
    step = Announced(FirstRunner)
    step.rows.begin_step(RUNS, [5, 5, 5, None, 7, 7])
    assert step.model.compute_logits(HIDDEN[[1, 2, 3, 5, 8, 9]])[0] == [Run(5, 0, 3), Run(7, 4, 6)]


def test_rows_of_prompts() -> None:
    step = Announced(FirstRunner)
    parts = [slice(0, 3), slice(4, 6), slice(2, 8), slice(6, 9)]
    assert step.runner._get_prompt_logprobs_dict(HIDDEN, parts) == [
        [Run(5, 0, 3)],
        [],
        [Run(5, 0, 2), Run(7, 4, 6)],
        [Run(7, 0, 3)],
    ]


def test_the_second_runner_samples_and_then_reads_prompts() -> None:
    step = Announced(SecondRunner)
    batch = SimpleNamespace(
        cu_num_logits_np=np.array([0, 2, 3, 5]), logits_indices=torch.tensor([2, 3, 5, 8, 9])
    )
    assert step.runner.sample(HIDDEN, batch, None) == [Run(5, 0, 2), Run(7, 3, 5)]
    assert step.model.compute_logits(HIDDEN[:7])[0] == [Run(5, 0, 4), Run(7, 6, 7)]
    step.rows.begin_step(RUNS, [5, None, 7])
    assert step.runner.sample(HIDDEN, batch, None) == [Run(5, 0, 2), Run(7, 3, 5)]


def test_steps_without_an_adapter_on_the_head_are_left_alone() -> None:
    step = Announced(FirstRunner)
    step.rows.begin_step([], [])
    assert step.model.compute_logits(HIDDEN)[0] == []


def test_rows_that_nobody_knows_are_zeroed() -> None:
    model = Model()
    model.compute_logits = lambda hidden_states: hidden_states + 1  # type: ignore[method-assign]
    rows = LogitsRows(FirstRunner(model), model, lambda runs: None)
    rows.begin_step(RUNS, [5, None, 7])
    assert not model.compute_logits(HIDDEN).any()
    assert model.compute_logits(HIDDEN[:3]).all()
