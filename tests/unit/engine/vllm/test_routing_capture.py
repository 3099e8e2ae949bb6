"""What routers chose for requests that ask, by position: chunks, preemption, drafts, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.slot_worker import Worker
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.lora_utils import LoraState

from molehill.engine.adapter.model import TokenAdapters
from molehill.engine.routing_stats import SiteCost, cost_table, token_costs
from molehill.engine.vllm.host_cache import PreparedAdapter
from molehill.engine.vllm.protocol import ForgetRoutesRequest, RoutesRequest, TokenRange
from molehill.engine.vllm.routing_capture import ASKED, RoutingCapture
from molehill.engine.vllm.token_rows import TokenRows
from molehill.kernels.interface import LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend

ADAPTER, SLOT = 7, 2
SITE = "layers.0.self_attn.q_proj"
ROUTER = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
# What stands for a token's hidden state.
HIDDEN = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
CHOICES = (HIDDEN @ ROUTER.T).topk(2).indices.tolist()


class Runner:
    """As much of a model runner as is followed."""

    def __init__(self, second: bool) -> None:
        if second:
            self.lora_state = LoraState(max_num_reqs=8)

    def execute_model(self, scheduler_output: Any) -> None:
        """Steps are run below."""

    def lay_out(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Asks for the mapping of rows as either runner does."""
        counts = np.array(sizes, dtype=np.int32)
        if hasattr(self, "lora_state"):
            self.lora_state.make_lora_inputs(list(names), np.arange(len(names)), counts)
        else:
            self.set_active_loras(SimpleNamespace(req_ids=list(names)), counts)

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any) -> None:
        """The order of rows is all that is followed."""


class Captured:
    """A linear with a mixture in one slot, and steps over it."""

    def __init__(self, second: bool) -> None:
        self.second, self.runner, self.backend = second, Runner(second), TorchBackend()
        self.handle = self.backend.register_linear(LinearShape("q", 8, 6))
        pair = Experts(torch.randn(4, 8), torch.randn(6, 4), (1,) * 4)
        piece = LinearPiece(SITE, 0, pair, TopK(2), ROUTER)
        self.backend.store(SLOT, SlotWeights({self.handle: [piece]}, {}))
        self.capture = RoutingCapture(self.runner, self.backend, {ADAPTER: SLOT}.get)

    def run(
        self,
        layout: Mapping[str, Sequence[int]],
        fresh: Sequence[NewRequestData] = (),
        cached: Mapping[str, int] | None = None,
        plain: Sequence[str] = (),
    ) -> None:
        """layout: by request, the tokens that it has in the step. plain: whose rows the adapter
        does not act on."""
        step = SchedulerOutput.make_empty()
        step.scheduled_new_reqs = list(fresh)
        running = CachedRequestData.make_empty()
        running.req_ids = list(cached or {})
        running.num_computed_tokens = list((cached or {}).values())
        step.scheduled_cached_reqs = running
        self.runner.execute_model(step)
        self.runner.lay_out(list(layout), [len(tokens) for tokens in layout.values()])
        runs, row = [], 0
        for name, tokens in layout.items():
            if name not in plain:
                runs.append(Run(SLOT, row, row + len(tokens)))
            row += len(tokens)
        self.capture.collect()
        self.backend.begin_step(runs)
        self.capture.begin_step(runs)
        x = HIDDEN[[token for tokens in layout.values() for token in tokens]]
        self.backend.linear(torch.zeros(row, 6), x, self.handle)

    def take(self, key: str, stop: int, index: int = 0, forget: bool = False) -> list[list[int]]:
        part = TokenRange(index, 0, stop)
        reply = self.capture.take(RoutesRequest(key, (part,), forget=forget), 0, lambda _: None)
        if not reply.parts:
            return []
        assert (reply.routers, reply.most) == (((SITE, 0),), 2)
        result = np.frombuffer(reply.parts[0].experts, np.int16).reshape(-1, 2)
        return result.tolist()


@pytest.fixture(params=[False, True], ids=["first runner", "second runner"])
def captured(request: Any) -> Captured:
    return Captured(request.param)


def new(
    name: str,
    key: str | None,
    n: int = 1,
    computed: int = 0,
    lora_id: int = ADAPTER,
    **more: Any,
) -> NewRequestData:
    asked = {"key": key, "tokens": 12, "weights": False, "n": n, **more}
    parameters = SamplingParams()
    parameters.extra_args = None if key is None else {ASKED: asked}
    lora = LoRARequest("own", lora_id, "path")
    return NewRequestData(name, [0] * 5, [], parameters, None, ([],), computed, lora)


def test_chunks_of_a_prompt_and_its_answer_beside_others(captured: Captured) -> None:
    captured.run({"other": [9, 8], "own": [1, 2, 3]}, [new("other", None), new("own", "k")])
    captured.run({"own": [4, 5], "other": [7]}, cached={"own": 3, "other": 2})
    captured.run({"own": [6], "other": [5]}, cached={"own": 5, "other": 3})
    assert captured.take("k", 6) == [CHOICES[token] for token in range(1, 7)]
    assert captured.take("k", 2) == [CHOICES[1], CHOICES[2]]


def test_what_is_computed_again_counts_last(captured: Captured) -> None:
    """A draft that was rejected, then a preemption, after which the request is a new one to the
    second runner."""
    captured.run({"own": [1, 2]}, [new("own", "k")])
    captured.run({"own": [3, 40, 41]}, cached={"own": 2})
    captured.run({"own": [4]}, cached={"own": 3})
    assert captured.take("k", 4) == [CHOICES[token] for token in (1, 2, 3, 4)]
    again = [new("own", "k")] if captured.second else []
    captured.run({"own": [1, 2, 3, 4, 5]}, again, cached={} if again else {"own": 0})
    assert captured.take("k", 5) == [CHOICES[token] for token in (1, 2, 3, 4, 5)]


def test_rows_before_an_invocation_are_nobodys(captured: Captured) -> None:
    captured.run({"own": [1, 2]}, [new("own", "k")], plain=["own"])
    captured.run({"own": [3]}, cached={"own": 2})
    assert captured.take("k", 3) == [[-1, -1], [-1, -1], CHOICES[3]]


def test_samples_of_one_prompt_are_told_apart(captured: Captured) -> None:
    captured.run({"1_own": [1], "0_own": [2]}, [new("0_own", "k", 2), new("1_own", "k", 2)])
    assert captured.take("k", 1, index=0) == [CHOICES[2]]
    assert captured.take("k", 1, index=1) == [CHOICES[1]]


def test_what_was_told_or_forgotten_is_gone_and_the_request_runs_on(captured: Captured) -> None:
    captured.run({"a": [1], "b": [2]}, [new("a", "a"), new("b", "b")])
    assert captured.take("a", 1, forget=True) == [CHOICES[1]]
    captured.capture.forget(ForgetRoutesRequest("b"))
    captured.run({"a": [3], "b": [4]}, cached={"a": 1, "b": 1})
    assert captured.take("a", 2) == captured.take("b", 2) == []
    assert captured.backend.captured().numel() == 0


@pytest.mark.parametrize("tokens", [2, 0])
def test_more_tokens_than_were_announced_are_left_out(captured: Captured, tokens: int) -> None:
    captured.run({"own": [1, 2, 3]}, [new("own", "k", tokens=tokens)])
    captured.run({"own": [4]}, cached={"own": 3})
    assert captured.take("k", 4) == [CHOICES[1], CHOICES[2]][:tokens]


def test_a_request_that_asks_in_no_known_way_is_one_that_does_not_ask(captured: Captured) -> None:
    """Nothing may raise in a step."""
    wrong = new("own", "k")
    assert wrong.sampling_params is not None
    for asked in ("yes", {"key": "k"}, {"key": "k", "n": 2, "tokens": 3, "weights": True}):
        wrong.sampling_params.extra_args = {ASKED: asked}
        captured.run({"own": [1]}, [wrong])
    assert captured.take("k", 1) == []


class Model(nn.Module):
    """A linear that is called with the ids of its rows' tokens."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    def forward(self, input_ids: Tensor) -> None:
        x = HIDDEN[input_ids]
        self.worker.backend.linear(torch.zeros(len(x), 6), x, self.worker.handle)


TABLE = TokenAdapters({}, torch.tensor([-1, 1, -1, 0, 0]), 1)


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_rows_by_token_id_beside_those_of_a_request_that_asks(second: bool) -> None:
    """Such a step is announced twice: rows by token id are dealt out as the model is called."""
    worker = Worker()
    runner, model = Runner(second), Model(worker)
    prices = (cost_table((("q", SiteCost((flops,), None)),)) for flops in (10, 100))
    parts = tuple(replace(worker.adapter(), costs=price) for price in prices)
    costs = token_costs([part.costs for part in parts])
    empty = SlotWeights({}, {})
    worker.slots.store(
        ADAPTER, PreparedAdapter(costs, {}, 0, False, empty, by_token=TABLE, members=parts)
    )
    pair = Experts(torch.randn(4, 8), torch.randn(6, 4), (1,) * 4)
    piece = LinearPiece(SITE, 0, pair, TopK(2), ROUTER)
    mixture = SlotWeights({worker.handle: [piece]}, {})
    mixed = worker.slots.store(8, PreparedAdapter(cost_table(()), {}, 0, False, mixture))
    capture = RoutingCapture(runner, worker.backend, worker.slots.slot, worker.slots.members)

    def announce(runs: Sequence[Run]) -> None:
        worker.backend.begin_step(runs)
        capture.begin_step(runs)

    rows = TokenRows(model, worker.slots, announce)
    dealt = worker.slots.slot(ADAPTER)
    assert dealt is not None
    tokens = {"table": [3, 0, 9], "own": [1, 4], "other": [2]}
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [new("table", "t"), new("own", "k", lora_id=8), new("other", None)]
    for start in (0, 2):
        step.scheduled_cached_reqs = CachedRequestData.make_empty()
        step.scheduled_cached_reqs.req_ids = ["table", "own"] if start else []
        step.scheduled_cached_reqs.num_computed_tokens = [3, 2] if start else []
        runner.execute_model(step)
        runner.lay_out(list(tokens), [3, 2, 1])
        capture.collect()
        rows.begin_step([Run(dealt, 0, 3), Run(mixed, 3, 5), Run(dealt, 5, 6)])
        assert worker.backend.captured().numel() == 0
        model(torch.tensor([token for part in tokens.values() for token in part]))
        step.scheduled_new_reqs = []
    capture.collect()
    asked = RoutesRequest("k", (TokenRange(0, 0, 4),))
    (routes,) = capture.take(asked, 0, lambda _: None).parts
    assert np.frombuffer(routes.experts, np.int16).reshape(-1, 2).tolist() == [
        CHOICES[token] for token in (1, 4, 1, 4)
    ]
    # The bill of the other: of tokens 3, 0 and 9, one has the first, one none, one the second.
    bill = RoutesRequest("t", (TokenRange(0, 6, 6),), usage=True)
    usage = capture.take(bill, 0, {ADAPTER: costs}.get).usage
    assert (usage.tokens, usage.decisions, usage.activated) == (6, 6, 4)
    assert usage.flops == 2 * (10 + 100)


def test_usage_is_choices_times_costs(captured: Captured) -> None:
    costs = cost_table(
        ((SITE, SiteCost((10, 20, 40, 80), 3)), ("layers.0.mlp", SiteCost((5,), None)))
    )
    captured.run({"own": [1]}, [new("own", "k")], plain=["own"])
    captured.run({"own": [2, 3]}, cached={"own": 1})
    asked = RoutesRequest("k", (TokenRange(0, 3, 3),), usage=True)
    usage = captured.capture.take(asked, 0, lambda _: costs).usage
    chosen = [expert for token in (2, 3) for expert in CHOICES[token]]
    assert (usage.tokens, usage.decisions, usage.activated) == (2, 2, 4)
    assert usage.flops == sum((10, 20, 40, 80)[expert] for expert in chosen) + 2 * (3 + 5)
