"""The Triton backend: lifecycle, capacity, and launches that stay right while adapters change."""

from dataclasses import replace

import pytest
import torch
from support import native
from support.triton_cases import (
    CAPACITY,
    assert_close,
    backend,
    ffn_experts,
    ffn_piece,
    ffn_setup,
    ffn_weights,
    mixture,
    piece,
    random,
    run_ffn,
)

from molehill.kernels import reference
from molehill.kernels.checks import WeightsError
from molehill.kernels.interface import UNSERVED, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.triton import expand, ffn, gate, shrink
from molehill.kernels.triton.arena import ArenaFullError
from molehill.kernels.triton.launch_config import Capacity
from molehill.kernels.triton.packing import CapacityError

pytestmark = pytest.mark.usefixtures("interpreted")


class Recorder:
    """A kernel that remembers its launches, as a CUDA graph does."""

    def __init__(self, kernel, graph: list) -> None:
        self.kernel, self.graph = kernel, graph

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.graph.append((self.kernel, grid, args, constants))
            return self.kernel[grid](*args, **constants)

        return launch


@pytest.mark.slow
@pytest.mark.skipif(native.is_here(), reason="tests/gpu captures a graph, which this only records")
def test_launches_captured_before_any_adapter_serve_the_adapters_loaded_later(monkeypatch) -> None:
    """The same grids and addresses, replayed after loading, unloading and loading again."""
    d, width, tokens = 24, 40, 8
    weights = ffn_weights(d, width, torch.float32)
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    graph: list = []
    x, gate_up = random(tokens, d, seed=25), torch.zeros(tokens, 2 * width)
    h, y = torch.zeros(tokens, width), torch.zeros(tokens, d)
    with monkeypatch.context() as patch:
        for module, name in ((shrink, "shrink"), (gate, "gate"), (expand, "expand"), (ffn, "ffn")):
            kernel = f"{name}_kernel"
            patch.setattr(module, kernel, Recorder(getattr(module, kernel), graph))
        serving.begin_step([Run(UNSERVED, 0, tokens)])
        serving.linear(gate_up, x, linears[0])
        serving.ffn(h, gate_up, handle)
        serving.linear(y, h, linears[1])
    assert len(graph) == 7

    def replay() -> torch.Tensor:
        for kernel, grid, args, constants in graph:
            if args[0] is gate_up:
                gate_up.copy_(x @ torch.cat([weights["gate_proj"], weights["up_proj"]]).T)
            if args[0] is h and kernel is ffn.ffn_kernel:
                gate, up = gate_up.chunk(2, dim=1)
                h.copy_(torch.nn.functional.silu(gate) * up)
            if args[0] is y:
                y.copy_(h @ weights["down_proj"].T)
            kernel[grid](*args, **constants)
        return y.clone()

    biases = dict.fromkeys(weights)
    names = ("gate_proj", "up_proj", "down_proj")
    for seed in range(3):
        router = random(3, d, seed=50 + seed)
        ffn_mixture = FfnMixture(ffn_experts(names, d, width, 3), TopK(1 + seed % 2), router)
        serving.store(seed % 2, SlotWeights({}, {handle: ffn_piece(ffn_mixture)}))
        serving.begin_step([Run(seed % 2, 2, 7)])
        result = replay()
        assert_close(
            result[2:7], reference.ffn_mixture(x[2:7], weights, biases, "silu", ffn_mixture)[0]
        )
        serving.begin_step([])
        base = replay()
        assert torch.equal(base[:2], result[:2])
        assert not torch.allclose(base[2:7], result[2:7], atol=1e-3)
        serving.erase(seed % 2)


def test_a_step_without_adapters_launches_nothing(monkeypatch) -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    graph: list = []
    monkeypatch.setattr(shrink, "shrink_kernel", Recorder(shrink.shrink_kernel, graph))
    serving.begin_step([])
    serving.linear(torch.zeros(2, 16), torch.zeros(2, 16), handle)
    assert graph == []


@pytest.mark.slow
def test_rows_of_a_shorter_forward_are_never_written_past_its_end() -> None:
    linear_mixture = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    serving.store(0, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    serving.begin_step([Run(0, 0, 20)])
    memory = torch.zeros(20, 16)
    serving.linear(memory[:4], random(4, 16, seed=8), handle)
    assert memory[:4].count_nonzero() == 64
    assert memory[4:].count_nonzero() == 0


@pytest.mark.slow
def test_inputs_and_outputs_may_be_parts_of_larger_tensors() -> None:
    linear_mixture = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    serving.store(0, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    wide = random(4, 40, seed=8)
    serving.begin_step([Run(0, 0, 4)])
    for x in (wide[:, 5:21], random(16, 4, seed=9).T):
        memory = torch.zeros(4, 30)
        serving.linear(memory[:, 7:23], x, handle)
        expected = reference.linear_mixture(x, torch.zeros(16, 16), None, linear_mixture)[0]
        assert_close(memory[:, 7:23], expected)
        assert memory[:, :7].count_nonzero() == memory[:, 23:].count_nonzero() == 0


@pytest.mark.slow
def test_more_adapters_than_a_step_may_hold_are_zeroed_not_served_by_the_base() -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    for slot in range(4):
        linear_mixture = mixture(Constant((1.0,)), (2,), 16, 16, seed=slot)
        serving.store(slot, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    y = torch.ones(5, 16)
    serving.begin_step([Run(slot, slot, slot + 1) for slot in range(4)])
    serving.linear(y, random(5, 16, seed=8), handle)
    assert y[3].count_nonzero() == 0
    assert y[:3].ne(1).any(dim=1).all()
    assert y[4].eq(1).all()


def test_an_erased_adapter_is_gone_and_its_memory_free() -> None:
    linear_mixture = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    free = serving.table.arena.free_bytes
    serving.store(0, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    assert serving.resident_bytes(0) == free - serving.table.arena.free_bytes > 0
    serving.erase(0)
    assert (serving.resident_bytes(0), serving.table.arena.free_bytes) == (0, free)
    y = torch.ones(2, 16)
    serving.begin_step([Run(0, 0, 1)])
    serving.linear(y, random(2, 16, seed=8), handle)
    assert y[0].count_nonzero() == 0
    assert y[1].eq(1).all()


def refused(mixture: LinearMixture, capacity: Capacity, error: type[Exception], match: str) -> None:
    serving = backend(capacity)
    features, out = mixture.experts.a.shape[1], mixture.experts.b.shape[0]
    handle = serving.register_linear(LinearShape("layers.0.o", features, out))
    before = [t.clone() for t in (serving.table.heads, serving.table.arena.view(torch.uint8))]
    with pytest.raises(error, match=match):
        serving.store(0, SlotWeights({handle: [piece(mixture)]}, {}))
    after = [serving.table.heads, serving.table.arena.view(torch.uint8)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert serving.table.arena.free_bytes == serving.table.arena.budget
    assert serving.resident_bytes(0) == 0


def test_too_many_experts_are_refused_before_anything_is_written() -> None:
    linear_mixture = mixture(Soft(), (1,) * 17, 16, 16)
    refused(linear_mixture, CAPACITY, CapacityError, "site: found 17 experts, expected at most 16")


def test_too_many_rank_rows_are_refused_before_anything_is_written() -> None:
    linear_mixture = mixture(Soft(), (40, 30), 16, 16)
    refused(
        linear_mixture,
        CAPACITY,
        CapacityError,
        "layers.0.o: found 70 rank rows, expected at most 64",
    )


def test_an_adapter_over_the_memory_is_refused_before_anything_is_written() -> None:
    linear_mixture = mixture(Soft(), (8, 8), 64, 64)
    refused(linear_mixture, replace(CAPACITY, memory=4096), ArenaFullError, "at most 4096 of 4096")


def test_a_slot_beyond_the_table_is_refused() -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    weights = SlotWeights({handle: [piece(mixture(Soft(), (1,), 16, 16))]}, {})
    with pytest.raises(CapacityError, match="found slot 4, expected less than 4"):
        serving.store(4, weights)
    serving.store(0, weights)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        serving.store(0, weights)


@pytest.mark.slow
def test_traces_hold_what_the_kernels_routed() -> None:
    d, width = 16, 20
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    ffn_mixture = FfnMixture(ffn_experts(("up_proj",), d, width, 3), TopK(2), random(3, d, seed=24))
    up = mixture(DynMoLE(), (2, 3), d, width, 30)
    weights = SlotWeights({linears[0]: [piece(up, width, "up")]}, {handle: ffn_piece(ffn_mixture)})
    serving.store(1, weights)
    x = random(6, d, seed=25)
    assert serving.trace(True) == []
    serving.begin_step([Run(1, 2, 5)])
    run_ffn(serving, handle, linears, ffn_weights(d, width, torch.float32), x)
    traces = {trace.site: trace for trace in serving.trace(False)}
    assert set(traces) == {"up", "mlp"}
    for site, router, policy in (
        ("up", up.router, up.policy),
        ("mlp", ffn_mixture.router, ffn_mixture.policy),
    ):
        expected = reference.route(x[2:5], router, policy, len(router))
        torch.testing.assert_close(traces[site].weights, expected.weights)
        torch.testing.assert_close(traces[site].entropy, expected.entropy)
    assert serving.trace(False) == []


def test_a_routerless_mixture_needs_constant_weights() -> None:
    linear_mixture = replace(mixture(Soft(), (1, 1), 16, 16), router=None)
    refused(linear_mixture, CAPACITY, WeightsError, "site: router: found none, expected 2 rows")
