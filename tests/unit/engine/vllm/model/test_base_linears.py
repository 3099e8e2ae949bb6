"""Linears of vLLM whose GEMM molehill's op runs, beside what the mixtures begin with.

There is no second stream on a CPU: what is tested is the way through the op, compiled and not, in
which order the halves run, and that each step launches what it needs.
"""

from typing import Any

import pytest
import torch
from support.backend_cases import assert_near, experts, piece_delta, random, router
from support.streams import OneStream
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

from molehill.engine.vllm.model import hooks
from molehill.engine.vllm.model.base_linears import BaseLinears, SideStream
from molehill.kernels.interface import LinearPiece, LinearShape, Run, SlotWeights, SplitBackend
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend

INPUTS, OUT, ROWS = 24, 16, 7
RANKS = [4, 2, 3]


class Halves(TorchBackend):
    """The torch backend in halves: the first makes the delta from `x` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self._delta = torch.empty(0)

    def begin_linear(self, x: torch.Tensor, handle: int) -> None:
        self.calls.append(("begin", handle))
        self._delta = x.new_zeros(len(x), OUT)
        self.linear(self._delta, x, handle)

    def finish_linear(self, out: torch.Tensor, x: torch.Tensor, handle: int) -> None:
        self.calls.append(("finish", handle))
        out += self._delta


class Recorder(OneStream):
    """Notes when the GEMM runs among the halves."""

    def __init__(self, calls: list) -> None:
        self._calls = calls

    def run(self, base, beside):
        beside()
        self._calls.append(("gemm", len(self._calls)))
        return base()


class Stack(nn.Module):
    """Two linears of vLLM, one after the other on the same input."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            ReplicatedLinear(INPUTS, OUT, bias, params_dtype=dtype, disable_tp=True)
            for _ in range(2)
        )
        # A CPU build of vLLM packs weights and drops the originals.
        self.originals: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for seed, linear in enumerate(self.linears):
            linear.weight.data.copy_(random(OUT, INPUTS, seed=seed, scale=INPUTS**-0.5))
            if bias:
                linear.bias.data.copy_(random(OUT, seed=10 + seed))
            before = (linear.weight.data.clone(), linear.bias.data.clone() if bias else None)
            self.originals.append(before)
            linear.quant_method.process_weights_after_loading(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (linear(2 * x)[0] for linear in self.linears)
        both: torch.Tensor = first + second
        return both


def plain(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    """What the base's linears alone give, in float32."""
    rows = 2 * x.flatten(0, -2).float()
    first, second = (
        nn.functional.linear(rows, weight.float(), None if bias is None else bias.float())
        for weight, bias in stack.originals
    )
    return first + second


def piece(seed: int) -> LinearPiece:
    site_experts = experts(INPUTS, OUT, RANKS, seed)
    return LinearPiece("q", 0, site_experts, TopK(2), router(len(RANKS), INPUTS, seed))


@pytest.fixture
def served(request, one_rank):
    """A hooked stack, its backend and the pieces in slot 0."""
    dtype, bias = request.param
    stack = Stack(dtype, bias)
    backend = Halves()
    linears = BaseLinears(backend, Recorder(backend.calls))
    pieces = [piece(seed) for seed in range(2)]
    for linear in stack.linears:
        handle = backend.register_linear(LinearShape("linear", INPUTS, OUT, dtype))
        linears.add(handle, linear)
        hooks.replace_linear(linear, handle, linears.op, OUT)
    backend.store(0, SlotWeights({i: [one_piece] for i, one_piece in enumerate(pieces)}, {}))

    def begin_step(runs: list[Run]) -> None:
        backend.begin_step(runs)
        linears.begin_step(runs)

    return stack, backend, pieces, begin_step


EACH = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]


@pytest.mark.slow
@pytest.mark.parametrize("served", EACH, indirect=True, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(ROWS,), (1, ROWS)], ids=["2d", "3d"])
def test_the_op_gives_gemm_and_mixture_in_the_dtype_and_shape_of_the_input(
    served, compiled, shape
) -> None:
    stack, backend, pieces, begin_step = served
    dtype = stack.originals[0][0].dtype
    x = random(*shape, INPUTS, seed=3).to(dtype)
    torch._dynamo.reset()
    run = torch.compile(stack, backend="aot_eager", fullgraph=True) if compiled else stack
    rows = (2 * x).flatten(0, -2).float()
    delta = sum(piece_delta(rows, one_piece, dtype) for one_piece in pieces)
    base = plain(stack, x)
    expected = base.clone()
    expected[2:5] += delta[2:5]
    begin_step([Run(0, 2, 5)])
    y = run(x)
    assert (y.shape, y.dtype) == ((*shape, OUT), dtype)
    assert_near(y.flatten(0, -2), expected, dtype)
    assert not torch.allclose(y.flatten(0, -2)[2:5].float(), base[2:5], atol=0.1)
    names = [name for name, _ in backend.calls]
    assert names == ["begin", "gemm", "finish"] * 2

    backend.calls.clear()
    begin_step([])
    assert_near(run(x).flatten(0, -2), base, dtype)
    assert backend.calls == []


@pytest.mark.parametrize("served", EACH[:1], indirect=True, ids=str)
def test_the_traced_graph_names_no_layer(served) -> None:
    """Layers that differ in a constant would be compiled one by one."""
    stack, _, _, begin_step = served
    graphs = []

    def capture(module, _):
        graphs.append(module)
        return module.forward

    begin_step([])
    torch._dynamo.reset()
    torch.compile(stack, backend=capture, fullgraph=True)(random(ROWS, INPUTS, seed=3))
    ops = [node for node in graphs[0].graph.nodes if "base_linear" in str(node.target)]
    assert len(ops) == 2
    constants = [
        [argument for argument in node.args if not isinstance(argument, torch.fx.Node)]
        for node in ops
    ]
    assert constants == [[None, OUT]] * 2


def test_a_gemm_that_returns_a_part_of_a_wider_output_is_copied_into_its_own() -> None:
    class Padded:
        def apply(self, layer, x, bias):
            return nn.functional.pad(x, (0, 8))[:, : x.shape[1]]

    layer: Any = nn.Module()
    layer.quant_method = Padded()
    backend = Halves()
    handle = backend.register_linear(LinearShape("linear", OUT, OUT))
    linears = BaseLinears(backend, OneStream())
    linears.add(handle, layer)
    x = random(3, OUT, seed=1)
    for runs in ([], [Run(0, 0, 3)]):
        linears.begin_step(runs)
        y = linears.op(x, None, torch.tensor([handle]), OUT)
        assert torch.equal(y, x)
        assert y.is_contiguous()


def test_weights_of_a_byte_keep_their_gemm_in_the_graph() -> None:
    module = nn.Module()
    for dtype, expected in (
        (torch.float8_e4m3fn, True),
        (torch.int8, True),
        (torch.bfloat16, False),
        (torch.int32, False),
    ):
        module.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
        assert hooks.quantises_inputs(module) is expected
    assert not hooks.quantises_inputs(nn.Module())


def test_only_a_backend_in_halves_is_split() -> None:
    assert isinstance(Halves(), SplitBackend)
    assert not isinstance(TorchBackend(), SplitBackend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: streams fork there")
def test_a_captured_graph_forks_and_joins_and_eager_steps_do_not() -> None:
    streams = SideStream(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    out, seen = torch.zeros(4, device="cuda"), []

    def beside() -> None:
        seen.append(torch.cuda.current_stream())
        out.copy_(x + 1)

    def run() -> torch.Tensor:
        return streams.run(lambda: x * 2, beside) + out

    main = torch.cuda.Stream()
    with torch.cuda.stream(main):
        assert torch.equal(run(), torch.full_like(x, 4))
        assert seen == [main]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=main):
            y = run()
    assert seen[1] != main
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, 2 * x + x + 1)


def test_a_linear_that_would_run_a_kernel_of_its_own_runs_the_op(one_rank: None) -> None:
    """DeepSeek V3's first projections, whose forward may go round the quant method on a GPU."""
    linear = DeepSeekV2FusedQkvAProjLinear(INPUTS, [OUT, OUT])
    linear.weight.data.copy_(random(2 * OUT, INPUTS, seed=3))
    linear.quant_method.process_weights_after_loading(linear)
    x = random(ROWS, INPUTS, seed=4).to(linear.weight.dtype)
    expected = linear(x)[0] + 1
    linear._use_min_latency_gemm = True

    def add_one(out: torch.Tensor, x: torch.Tensor, handle: torch.Tensor) -> None:
        out += 1

    hooks.hook_linear(linear, 0, add_one)
    assert torch.equal(linear(x)[0], expected)
