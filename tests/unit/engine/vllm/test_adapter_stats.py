"""The stats on a real backend: figures through stays, re-used ids and forgotten adapters."""

import pytest
import torch

from molehill.engine.adapter.model import Adapter
from molehill.engine.routing_stats import costs
from molehill.engine.vllm import adapter_stats as module
from molehill.engine.vllm.adapter_stats import AdapterStats
from molehill.kernels.interface import LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend

SITE, IN, OUT, EXPERTS = "layers.0.self_attn.q_proj", 8, 6, 4


class Worker:
    """One linear, whose adapters choose one of four experts; its stats kept as a worker does."""

    def __init__(self) -> None:
        self.backend = TorchBackend()
        self.handle = self.backend.register_linear(LinearShape("q", IN, OUT))
        self.stats = AdapterStats(self.backend.counters, self.backend.resident_bytes)

    def load(self, lora_id: int, name: str, slot: int, rank: int = 2) -> None:
        pair = Experts(
            torch.randn(EXPERTS * rank, IN), torch.randn(OUT, EXPERTS * rank), (rank,) * EXPERTS
        )
        mixture = LinearMixture(pair, TopK(1), torch.randn(EXPERTS, IN))
        piece = LinearPiece(SITE, 0, pair, mixture.policy, mixture.router)
        self.backend.store(slot, SlotWeights({self.handle: [piece]}, {}))
        self.stats.enter_slot(lora_id, name, slot, costs(Adapter("mola", {SITE: mixture})))

    def unload(self, lora_id: int, slot: int) -> None:
        self.stats.leave_slot(lora_id)
        self.backend.erase(slot)

    def step(self, tokens: int, slot: int) -> None:
        self.stats.mark_active([slot])
        self.backend.begin_step([Run(slot, 0, tokens)])
        self.backend.linear(torch.zeros(tokens, OUT), torch.randn(tokens, IN), self.handle)


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_figures_follow_the_steps(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    assert worker.stats.report([1])[1].stats.tokens == 0
    for tokens in (3, 4):
        worker.step(tokens, slot=0)
        worker.stats.report([1])
    report = worker.stats.report([1])[1]
    assert report.name == "a"
    assert report.resident_bytes == worker.backend.resident_bytes(0) > 0
    stats = report.stats
    assert (stats.tokens, stats.decisions, sum(stats.expert_tokens)) == (7, 7, 7)
    flops = 2 * 2 * (IN + OUT)
    assert stats.flops_done == 7 * (flops + 2 * EXPERTS * IN)
    assert stats.flops_avoided == 7 * 3 * flops


def test_an_evicted_adapter_keeps_its_figures_and_goes_on_from_them(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    worker.step(5, slot=0)
    before = worker.stats.sites(1)
    worker.unload(1, slot=0)
    report = worker.stats.report([1])[1]
    assert report.resident_bytes is None
    assert report.stats.tokens == 5
    assert worker.stats.sites(1) == before

    worker.load(1, "a", slot=3)
    worker.step(2, slot=3)
    report = worker.stats.report([1])[1]
    assert report.resident_bytes > 0
    assert report.stats.decisions == report.stats.tokens == 7
    tokens, sites = worker.stats.sites(1)
    assert tokens == sum(sites[SITE].expert_tokens) == 7


def test_an_adapter_that_is_gone_is_told_once_more(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    worker.step(5, slot=0)
    worker.unload(1, slot=0)
    assert worker.stats.report([])[1].stats.tokens == 5
    assert worker.stats.report([]) == {}
    assert worker.stats.sites(1) == (0, {})


def test_of_an_adapter_that_will_not_come_back_a_total_is_kept(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    worker.step(5, slot=0)
    worker.stats.report([1], op_seconds=1.0)
    worker.step(3, slot=0)
    worker.unload(1, slot=0)
    for _ in range(2):
        worker.stats.finish(1)
    assert worker.stats.sites(1) == (0, {})
    stats = worker.stats.report([], op_seconds=2.0)[1].stats
    assert (stats.tokens, stats.decisions, stats.op_seconds) == (8, 8, 2.0)
    assert worker.stats.report([]) == {}
    worker.stats.finish(1)


def test_an_id_with_other_weights_starts_anew(worker: Worker) -> None:
    worker.load(1, "a", slot=0, rank=2)
    worker.step(5, slot=0)
    worker.unload(1, slot=0)
    worker.load(1, "a", slot=0, rank=3)
    worker.step(2, slot=0)
    assert worker.stats.report([1])[1].stats.tokens == 2


def test_adapters_that_nobody_asks_about_are_forgotten(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OUTSIDE", 3)
    for lora_id in range(5):
        worker.load(lora_id, "a", slot=0)
        worker.unload(lora_id, slot=0)
    assert list(worker.stats.report([])) == [2, 3, 4]


def test_seconds_of_the_ops_grow_with_adapter_steps_only(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    assert worker.backend.seconds() == 0.0
    worker.backend.begin_step([])
    worker.backend.linear(torch.zeros(2, OUT), torch.randn(2, IN), worker.handle)
    assert worker.backend.seconds() == 0.0
    worker.step(2, slot=0)
    first = worker.backend.seconds()
    worker.step(2, slot=0)
    assert 0 < first < worker.backend.seconds()


def test_the_ops_seconds_go_to_adapters_by_their_flops(worker: Worker) -> None:
    worker.load(1, "a", slot=0)
    worker.load(2, "b", slot=1, rank=4)
    for slot, tokens in ((0, 6), (1, 2)):
        worker.step(tokens, slot)
    report = worker.stats.report([1, 2], op_seconds=3.0)
    done = {number: report[number].stats.flops_done for number in (1, 2)}
    for number in (1, 2):
        expected = 3.0 * done[number] / sum(done.values())
        assert report[number].stats.op_seconds == pytest.approx(expected)
    # Only the second has run since, and is out of the slots by now.
    worker.step(1, slot=1)
    worker.unload(2, slot=1)
    later = worker.stats.report([1], op_seconds=5.0)
    assert later[1].stats == report[1].stats
    before = report[2].stats.op_seconds
    assert later[2].stats.op_seconds == pytest.approx(before + 2.0)
    assert worker.stats.report([1], op_seconds=5.0)[1].stats == report[1].stats
