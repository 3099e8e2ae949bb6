"""An FFN's activation in the launch that adds its gate_up linear's mixtures, in Triton's
interpreter, against the definition."""

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
    ffn_weights,
    mixture,
    piece,
    random,
)
from torch import Tensor

from molehill.kernels import reference
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.interface import (
    UNSERVED,
    BaseActivation,
    CapacityError,
    FfnShape,
    LinearShape,
    Run,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import FfnMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, Threshold, TopK, TopP
from molehill.kernels.triton import activate, gate, shrink

pytestmark = pytest.mark.usefixtures("interpreted")

D, WIDTH = 16, 40
SILU = BaseActivation("silu", is_rounded=False)


def setup(dtype, activation=SILU, capacity=CAPACITY, width=WIDTH):
    """A backend with one FFN that it activates: backend, FFN, its linears."""
    serving = backend(capacity)
    up = serving.register_linear(LinearShape("gate_up", D, 2 * width, dtype))
    down = serving.register_linear(LinearShape("down", width, D, dtype))
    return serving, serving.register_ffn(FfnShape("mlp", up, down, width, activation)), (up, down)


def run(serving, ffn: int, linear: int, x: Tensor, base: Tensor) -> Tensor:
    """h of the base's pre-activations, with the backend's ops where the engine has them. What no
    launch fills is NaN."""
    gate_up = base.clone()
    serving.begin_linear(x, linear)
    serving.finish_linear(gate_up, x, linear)
    assert torch.equal(gate_up, base)
    h = torch.full((len(x), base.shape[1] // 2), float("nan"), dtype=base.dtype)
    serving.activate(h, gate_up, ffn)
    return h


def activated(gate_up: Tensor, activation: BaseActivation) -> Tensor:
    """By torch, in the dtype of gate_up, as the base computes it."""
    gate, up = gate_up.float().chunk(2, dim=1)
    active = ACTIVATIONS[activation.name](gate)
    if activation.is_rounded:
        active = active.to(gate_up.dtype).float()
    return (active * up).to(gate_up.dtype)


def added(x: Tensor, base: Tensor, parts) -> Tensor:
    """Pre-activations with the mixtures of `parts`, (first column, mixture) each."""
    total = base.to(torch.float32, copy=True)
    for start, routed in parts:
        rows = routed.experts.b.shape[0]
        delta = reference.linear_mixture(x, torch.zeros(rows, x.shape[1]), None, routed)[0]
        total[:, start : start + rows] += delta
    return total.to(base.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (SILU, torch.float32),
        (BaseActivation("silu", is_rounded=True), torch.bfloat16),
    ],
    ids=str,
)
def test_rows_of_adapters_and_of_the_base_are_activated_in_one_launch(activation, dtype) -> None:
    serving, ffn, (linear, _) = setup(dtype, activation)
    both = mixture(TopK(1), (2, 3), D, WIDTH, 1), mixture(DynMoLE(), (1, 4, 2), D, WIDTH, 5)
    pieces = [piece(both[0], 0, "gate"), piece(both[1], WIDTH, "up")]
    serving.store(0, SlotWeights({linear: pieces}, {}))
    static = mixture(Constant((1.0,)), (17,), D, WIDTH, 9)
    serving.store(2, SlotWeights({linear: [piece(static, WIDTH, "up")]}, {}))
    x, base = random(12, D, seed=2).to(dtype), random(12, 2 * WIDTH, seed=3).to(dtype)
    serving.begin_step([Run(2, 1, 4), Run(0, 5, 8), Run(UNSERVED, 8, 9)])
    h = run(serving, ffn, linear, x, base)
    expected = base.clone()
    expected[5:8] = added(x[5:8], base[5:8], zip((0, WIDTH), both, strict=True))
    expected[1:4] = added(x[1:4], base[1:4], [(WIDTH, static)])
    expected[8] = 0
    assert_close(h, activated(expected, activation))
    plain = activated(base, activation)
    assert_close(h[[0, 4, 9, 10, 11]], plain[[0, 4, 9, 10, 11]])
    assert not torch.allclose(h[5:8].float(), plain[5:8].float(), atol=0.1)
    assert h[8].count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", [TopP(0.5), Soft(), Threshold(0.3)], ids=str)
def test_one_piece_may_be_both_halves(policy) -> None:
    """As Phi-3 has it; rows one by one, which short steps of many adapters route first."""
    serving, ffn, (linear, _) = setup(torch.float32)
    for slot in range(2):
        routed = mixture(policy, (2, 3), D, 2 * WIDTH, 7 * slot)
        serving.store(slot, SlotWeights({linear: [piece(routed)]}, {}))
    x, base = random(5, D, seed=2), random(5, 2 * WIDTH, seed=3)
    serving.begin_step([Run(0, 0, 1), Run(1, 1, 3), Run(0, 4, 5)])
    h = run(serving, ffn, linear, x, base)
    expected = base.clone()
    for slot, rows in ((0, [0, 4]), (1, [1, 2])):
        routed = mixture(policy, (2, 3), D, 2 * WIDTH, 7 * slot)
        expected[rows] = added(x[rows], base[rows], [(0, routed)])
    assert_close(h, activated(expected, SILU))


@pytest.mark.slow
def test_added_biases_are_added_before_it_is_activated() -> None:
    """With a pair on gate_proj and without one on up_proj."""
    serving, ffn, (linear, _) = setup(torch.float32)
    routed = mixture(TopK(1), (2, 3), D, WIDTH, 1)
    biases = random(2 * WIDTH, seed=4)
    nothing = mixture(Constant((1.0,)), (0,), D, WIDTH, 5)
    pieces = [
        replace(piece(routed, 0, "gate"), added_bias=biases[:WIDTH]),
        replace(piece(nothing, WIDTH, "up"), added_bias=biases[WIDTH:]),
    ]
    serving.store(0, SlotWeights({linear: pieces}, {}))
    x, base = random(3, D, seed=2), random(3, 2 * WIDTH, seed=3)
    serving.begin_step([Run(0, 0, 2)])
    h = run(serving, ffn, linear, x, base)
    expected = base.clone()
    expected[:2] = added(x[:2], base[:2], [(0, routed)]) + biases
    assert_close(h, activated(expected, SILU))


@pytest.mark.slow
def test_output_scales_change_the_base_before_it_is_activated() -> None:
    """DoRA on up_proj, whose piece is less than its half."""
    width = WIDTH - 8
    serving, ffn, (linear, _) = setup(torch.float32)
    routed = mixture(TopK(1), (2, 3), D, width, 1)
    scale, bias = 1 + 0.3 * random(2, width, seed=4), random(width, seed=6)
    dora = replace(piece(routed, WIDTH, "up"), output_scale=scale, bias=bias)
    serving.store(0, SlotWeights({linear: [dora]}, {}))
    x, base = random(3, D, seed=2), random(3, 2 * WIDTH, seed=3)
    serving.begin_step([Run(0, 0, 3)])
    h = run(serving, ffn, linear, x, base)
    weights = reference.route(x, routed.router, routed.policy, 2).weights
    expected = base.clone()
    columns = slice(WIDTH, WIDTH + width)
    expected[:, columns] = (base[:, columns] - bias) * (weights @ scale) + bias
    assert_close(h, activated(added(x, expected, [(WIDTH, routed)]), SILU))


@pytest.mark.slow
def test_long_steps_and_rows_that_nobody_announced_are_activated() -> None:
    tokens = 300
    serving, ffn, (linear, _) = setup(torch.float32, capacity=replace(CAPACITY, tokens=tokens))
    routed = mixture(TopK(1), (2, 3), D, WIDTH, 1)
    serving.store(1, SlotWeights({linear: [piece(routed)]}, {}))
    x, base = random(tokens, D, seed=2), random(tokens, 2 * WIDTH, seed=3)
    serving.begin_step([Run(1, 3, 70), Run(1, 260, 262)])
    h = run(serving, ffn, linear, x, base)
    expected = base.clone()
    for rows in (slice(3, 70), slice(260, 262)):
        expected[rows] = added(x[rows], base[rows], [(0, routed)])
    assert_close(h, activated(expected, SILU))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (SILU, torch.bfloat16),
        (BaseActivation("gelu", is_rounded=False), torch.float32),
        (BaseActivation("gelu", is_rounded=True), torch.bfloat16),
        (BaseActivation("gelu_pytorch_tanh", is_rounded=False), torch.float32),
        (BaseActivation("gelu_pytorch_tanh", is_rounded=True), torch.bfloat16),
    ],
    ids=str,
)
def test_a_forward_shorter_than_announced_is_activated_whole(activation, dtype) -> None:
    serving, ffn, (linear, _) = setup(dtype, activation)
    x, base = random(6, D, seed=2).to(dtype), random(6, 2 * WIDTH, seed=3).to(dtype)
    serving.begin_step([Run(UNSERVED, 10, 40)])
    assert_close(run(serving, ffn, linear, x, base), activated(base, activation))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ffn_mixtures_are_in_the_same_launch_and_start_from_what_the_linears_became(dtype) -> None:
    """Slot 0: an FFN mixture alone; slot 1: a linear mixture; slot 2: both."""
    weights = ffn_weights(D, WIDTH, dtype)
    names = ("gate_proj", "up_proj", "down_proj")
    routed = FfnMixture(ffn_experts(names, D, WIDTH, 3), TopK(2), random(3, D, seed=24))
    up, down = mixture(TopK(1), (2, 3), D, WIDTH, 30), mixture(Soft(), (1, 2), WIDTH, D, 40)
    static = mixture(Constant((1.0,)), (3,), D, WIDTH, 50)
    serving, ffn, linears = setup(dtype)
    serving.store(0, SlotWeights({}, {ffn: ffn_piece(routed)}))
    pieces = {linears[0]: [piece(up, WIDTH, "up")], linears[1]: [piece(down, 0, "down")]}
    serving.store(1, SlotWeights(pieces, {}))
    alone = SlotWeights({linears[0]: [piece(static, WIDTH, "up")]}, {ffn: ffn_piece(routed)})
    serving.store(2, alone)
    x = random(8, D, seed=25).to(dtype)
    serving.begin_step([Run(0, 0, 2), Run(1, 2, 4), Run(2, 4, 7)])
    stacked = torch.cat([weights["gate_proj"], weights["up_proj"]])
    h = run(serving, ffn, linears[0], x, x @ stacked.T)
    y = h @ weights["down_proj"].T
    serving.linear(y, h, linears[1])
    biases = dict.fromkeys(weights)
    assert_close(y[:2], reference.ffn_mixture(x[:2], weights, biases, "silu", routed)[0].to(dtype))
    hidden = torch.nn.functional.silu(x @ weights["gate_proj"].T)
    hidden *= reference.linear_mixture(x, weights["up_proj"], None, up)[0].to(dtype)
    expected = reference.linear_mixture(hidden, weights["down_proj"], None, down)[0].to(dtype)
    assert_close(y[2:4], expected[2:4])
    pair = static.experts
    changed = weights | {"up_proj": (weights["up_proj"].float() + pair.b @ pair.a).to(dtype)}
    whole = reference.ffn_mixture(x, changed, biases, "silu", routed)[0].to(dtype)
    assert_close(y[4:7], whole[4:7])
    assert_close(h[7:], activated(x[7:] @ stacked.T, SILU))


def test_a_piece_that_begins_within_a_half_is_refused() -> None:
    serving, _, (linear, _) = setup(torch.float32)
    weights = SlotWeights({linear: [piece(mixture(Soft(), (1,), D, 16), 16, "up")]}, {})
    with pytest.raises(CapacityError, match="up: found columns from 16, expected 0 or 40"):
        serving.store(0, weights)
    assert serving.resident_bytes(0) == 0


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
def test_launches_recorded_before_any_adapter_serve_those_that_come_and_go(monkeypatch) -> None:
    """Linear mixtures, a vector and the base, by the same grids and addresses."""
    serving, ffn, (linear, _) = setup(torch.float32)
    x, base = random(4, D, seed=2), random(4, 2 * WIDTH, seed=3)
    gate_up, h, graph = base.clone(), torch.zeros(4, WIDTH), []
    with monkeypatch.context() as patch:
        for module, name in ((shrink, "shrink"), (gate, "gate"), (activate, "activate")):
            kernel = f"{name}_kernel"
            patch.setattr(module, kernel, Recorder(getattr(module, kernel), graph))
        serving.begin_step([Run(UNSERVED, 0, 4)])
        serving.begin_linear(x, linear)
        serving.finish_linear(gate_up, x, linear)
        serving.activate(h, gate_up, ffn)
    assert len(graph) == 3

    def replay(runs: list[Run]) -> Tensor:
        serving.begin_step(runs)
        gate_up.copy_(base)
        for kernel, grid, args, constants in graph:
            kernel[grid](*args, **constants)
        return h.clone()

    plain = activated(base, SILU)
    assert_close(replay([]), plain)
    routed = mixture(TopK(1), (2, 3), D, WIDTH, 1)
    serving.store(1, SlotWeights({linear: [piece(routed)]}, {}))
    expected = base.clone()
    expected[1:3] = added(x[1:3], base[1:3], [(0, routed)])
    assert_close(replay([Run(1, 1, 3)]), activated(expected, SILU))
    serving.erase(1)
    vector = 1 + random(1, 1, WIDTH, seed=4)
    scales = ScalePiece("mlp", Soft(), torch.zeros(1, WIDTH), vector)
    serving.store(1, SlotWeights({}, {}, {}, {ffn: scales}))
    expected = plain.clone()
    expected[2:] *= vector[0]
    assert_close(replay([Run(1, 2, 4)]), expected)
