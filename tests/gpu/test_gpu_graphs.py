"""The Triton backend under CUDA graphs and on two streams, without an engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.streams import OneStream
from support.triton_cases import CAPACITY, mixture, piece, random
from torch import nn

from molehill.engine.vllm.model import warmup
from molehill.engine.vllm.model.base_linears import BaseLinears, SideStream, Streams
from molehill.kernels import reference
from molehill.kernels.interface import (
    UNSERVED,
    BaseActivation,
    FfnShape,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.policy import DynMoLE, Soft, TopK
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.compilations import Compilations

TOKENS, INPUTS, OUT = 32, 96, 64
LAYERS = 3
# Of the GEMM in float32 and of what follows it.
TOLERANCE = 1e-4


class Model:
    """Linears one after the other, their GEMMs run by the op."""

    def __init__(self, streams: Streams) -> None:
        self.backend = TritonBackend(torch.device("cuda"), CAPACITY)
        self.linears = BaseLinears(self.backend, streams)
        self.weights = [random(OUT, INPUTS, seed=i, scale=0.1).cuda() for i in range(LAYERS)]
        for weight in self.weights:
            handle = self.backend.register_linear(LinearShape("linear", INPUTS, OUT))
            layer: Any = nn.Module()
            layer.weight, layer.quant_method = weight, self
            self.linears.add(handle, layer)
        self.backend.seal()

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight)

    def begin_step(self, runs: list[Run]) -> None:
        self.backend.begin_step(runs)
        self.linears.begin_step(runs)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.linears.run(x, None, handle) for handle in range(LAYERS)]

    def captured(self, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        self(x)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            ys = self(x)
        return graph, ys


@pytest.fixture(params=[OneStream, lambda: SideStream(torch.device("cuda"))], ids=["one", "two"])
def model(request: pytest.FixtureRequest) -> Model:
    torch.set_float32_matmul_precision("highest")
    return Model(request.param())


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How many Triton kernels were launched since."""
    from triton import knobs

    launches: list[int] = []

    def note(metadata: object) -> None:
        launches.append(1)

    knobs.runtime.launch_enter_hook.add(note)
    try:
        yield lambda: len(launches)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)


def test_a_graph_serves_adapters_stored_after_its_capture(model: Model) -> None:
    x = random(TOKENS, INPUTS, seed=7).cuda()
    model.begin_step([Run(UNSERVED, 0, TOKENS)])
    graph, ys = model.captured(x)
    for seed, policy in enumerate((TopK(2), DynMoLE(), Soft())):
        linear_mixture = [
            mixture(policy, (4, 2, 3), INPUTS, OUT, seed=i + seed) for i in range(LAYERS)
        ]
        weights = SlotWeights({i: [piece(one)] for i, one in enumerate(linear_mixture)}, {})
        model.backend.store(seed % 2, weights)
        model.begin_step([Run(seed % 2, 3, 20)])
        for value in (1, -1):
            x.copy_(value * random(TOKENS, INPUTS, seed=7))
            graph.replay()
            torch.cuda.synchronize()
            for y, weight, one in zip(ys, model.weights, linear_mixture, strict=True):
                expected = x.cpu() @ weight.cpu().T
                expected[3:20], _ = reference.linear_mixture(x.cpu()[3:20], weight.cpu(), None, one)
                assert (y.cpu() - expected).abs().max() < TOLERANCE * expected.abs().max()
        model.backend.erase(seed % 2)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Nor for a stored adapter, of any policy and any number of tokens."""
    compilations, eager_model = Compilations(), Model(OneStream())
    compilations.watch()
    shapes = {i: LinearShape("linear", INPUTS, OUT) for i in range(LAYERS)}
    warmup.run(eager_model.backend, shapes, {}, CAPACITY.tokens)
    compilations.expect_none()
    for slot, policy in enumerate((TopK(2), DynMoLE(), Soft())):
        one = piece(mixture(policy, (4, 2, 3), INPUTS, OUT))
        eager_model.backend.store(slot, SlotWeights({i: [one] for i in range(LAYERS)}, {}))
    for tokens in range(1, CAPACITY.tokens + 1):
        eager_model.begin_step([Run(tokens % 3, 0, tokens)])
        eager_model(random(tokens, INPUTS, seed=7).cuda())
    torch.cuda.synchronize()
    assert compilations.late == 0


def test_a_graph_without_adapters_launches_none_of_ours(model: Model) -> None:
    """Although one is stored."""
    linear_mixture = piece(mixture(TopK(1), (2, 2), INPUTS, OUT))
    model.backend.store(0, SlotWeights({0: [linear_mixture]}, {}))
    x = random(TOKENS, INPUTS, seed=7).cuda()
    with counted() as launches:
        model.begin_step([])
        graph, ys = model.captured(x)
        assert launches() == 0
        graph.replay()
        torch.cuda.synchronize()
        for y, weight in zip(ys, model.weights, strict=True):
            assert torch.equal(y, nn.functional.linear(x, weight))
        model.begin_step([Run(0, 0, TOKENS)])
        model(x)
        assert launches() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_activates_rows_of_adapters_stored_after_its_capture_and_of_the_base(dtype) -> None:
    """In the launch that adds the gate_up linear's mixture."""
    backend = TritonBackend(torch.device("cuda"), CAPACITY)
    width = OUT // 2
    linear = backend.register_linear(LinearShape("gate_up", INPUTS, OUT, dtype))
    down = backend.register_linear(LinearShape("down", width, INPUTS, dtype))
    silu = BaseActivation("silu", is_rounded=False)
    ffn = backend.register_ffn(FfnShape("mlp", linear, down, width, silu))
    backend.seal()
    x = random(TOKENS, INPUTS, seed=7).to("cuda", dtype)
    base = random(TOKENS, OUT, seed=8).to("cuda", dtype)
    gate_up, h = base.clone(), torch.empty(TOKENS, width, dtype=dtype, device="cuda")

    def step() -> None:
        gate_up.copy_(base)
        backend.begin_linear(x, linear)
        backend.finish_linear(gate_up, x, linear)
        backend.activate(h, gate_up, ffn)

    backend.begin_step([Run(UNSERVED, 0, TOKENS)])
    step()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    tolerance = TOLERANCE if dtype == torch.float32 else 1.5e-2
    for policy in (TopK(2), DynMoLE(), Soft()):
        routed = mixture(policy, (4, 2, 3), INPUTS, OUT)
        backend.store(1, SlotWeights({linear: [piece(routed)]}, {}))
        backend.begin_step([Run(1, 3, 20)])
        graph.replay()
        torch.cuda.synchronize()
        expected, rows = base.cpu().float(), x.cpu().float()
        delta = reference.linear_mixture(rows[3:20], torch.zeros(OUT, INPUTS), None, routed)[0]
        expected[3:20] += delta
        expected = expected.to(dtype).float()
        expected = nn.functional.silu(expected[:, :width]) * expected[:, width:]
        assert (h.cpu().float() - expected).abs().max() < tolerance * expected.abs().max()
        backend.erase(1)
