"""Rows by the ids of their tokens: which slot each row of a step is dealt to, and when."""

from collections.abc import Sequence

import pytest
import torch
from support.slot_worker import BYTES, RANK, Worker
from torch import Tensor, nn

from molehill.engine.adapter.errors import LimitError
from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.engine.routing_stats import TOKEN_IDS, token_costs, total_stats
from molehill.engine.vllm.host_cache import PreparedAdapter
from molehill.engine.vllm.token_rows import TokenRows
from molehill.kernels.interface import UNSERVED, Run, SlotWeights

NOTHING = Adapter("lora", {})
# Tokens 0 to 4: none, one, none, zero, zero; others one.
TABLE = TokenAdapters({"zero": NOTHING, "one": NOTHING}, torch.tensor([-1, 1, -1, 0, 0]), 1)
TOKENS = torch.tensor([9, 3, 4, 0, 1, 7, 2, 3])


class Model(nn.Module):
    """Says what was announced when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: list[list[Run]] = []
        self.called_with: list[Run] = []

    def announce(self, runs: Sequence[Run]) -> None:
        self.announced.append(list(runs))

    def forward(self, input_ids: Tensor | None = None) -> None:
        self.called_with = self.announced[-1]


def by_token(*members: PreparedAdapter) -> PreparedAdapter:
    return PreparedAdapter(
        token_costs([member.costs for member in members]),
        {},
        sum(member.num_bytes for member in members),
        False,
        SlotWeights({}, {}),
        by_token=TABLE,
        members=members,
    )


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def slot(worker: Worker) -> int:
    return worker.slots.store(7, by_token(worker.adapter(), worker.adapter()))


@pytest.fixture
def rows(worker: Worker, model: Model) -> TokenRows:
    return TokenRows(model, worker.slots, model.announce)


def members(worker: Worker, slot: int) -> tuple[int, ...]:
    dealt = worker.slots.by_token(slot)
    assert dealt is not None
    return dealt[1]


def test_rows_are_dealt_as_the_model_is_called(
    worker: Worker, model: Model, slot: int, rows: TokenRows
) -> None:
    zero, one = members(worker, slot)
    assert len({slot, zero, one}) == 3
    rows.begin_step([Run(slot, 0, 2), Run(5, 2, 3), Run(slot, 3, 8)])
    unserved = [Run(UNSERVED, 0, 2), Run(UNSERVED, 2, 3), Run(UNSERVED, 3, 8)]
    assert model.announced == [unserved]
    model(input_ids=TOKENS)
    assert model.called_with == [
        Run(one, 0, 1),
        Run(zero, 1, 2),
        Run(5, 2, 3),
        Run(one, 4, 6),
        Run(zero, 7, 8),
    ]
    model(input_ids=TOKENS)
    assert len(model.announced) == 2


def test_a_step_without_such_rows_is_announced_at_once(
    model: Model, slot: int, rows: TokenRows
) -> None:
    rows.begin_step([Run(slot, 0, 1)])
    rows.begin_step([Run(5, 0, 8)])
    model(input_ids=TOKENS)
    assert model.called_with == [Run(5, 0, 8)]
    assert len(model.announced) == 2


@pytest.mark.parametrize("ids", [None, TOKENS[:3]])
def test_rows_of_unknown_tokens_are_no_bodys(
    model: Model, slot: int, rows: TokenRows, ids: Tensor | None
) -> None:
    rows.begin_step([Run(slot, 0, 4)])
    model(input_ids=ids)
    assert model.called_with == [Run(UNSERVED, 0, 4)]


def test_each_adapters_tokens_are_counted(
    worker: Worker, model: Model, slot: int, rows: TokenRows
) -> None:
    rows = TokenRows(model, worker.slots, worker.backend.begin_step)
    rows.begin_step([Run(slot, 0, 8)])
    model.announced.append([])
    model(TOKENS)
    counters = worker.slots.counters(slot)
    assert counters.tokens == 8
    assert counters.sites[TOKEN_IDS].expert_tokens == [3, 3]
    stats = total_stats(counters, token_costs([worker.adapter().costs] * 2))
    assert (stats.tokens, stats.decisions, stats.expert_tokens) == (8, 8, [3, 3])


def test_its_slots_are_freed_together(worker: Worker, slot: int) -> None:
    zero, one = members(worker, slot)
    assert worker.slots.resident_bytes(slot) == 2 * BYTES
    assert worker.slots.erase(7) is None
    assert worker.slots.by_token(slot) is None
    assert [worker.backend.resident_bytes(n) for n in (slot, zero, one)] == [0, 0, 0]
    assert worker.slots.free_bytes == 2 * BYTES
    assert worker.slots.store(8, worker.adapter()) == slot


def test_one_that_does_not_fit_leaves_nothing(worker: Worker) -> None:
    large = by_token(worker.adapter(), worker.adapter(2 * RANK))
    with pytest.raises(LimitError, match="adapter memory"):
        worker.slots.store(7, large)
    assert worker.slots.adapters() == set()
    assert worker.slots.by_token(0) is None
    assert worker.slots.store(8, worker.adapter()) == 0
