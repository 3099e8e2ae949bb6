"""The Triton kernels, run by Triton's interpreter on the CPU, against the definition.

MOLEHILL_LONG_TESTS=1 runs the whole matrix of policies, shapes and dtypes: minutes, because the
interpreter runs every program in numpy.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from molehill.kernels import definition
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.arena import ArenaFullError
from molehill.kernels.backend import (
    UNSERVED,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP
from molehill.kernels.triton import expand, ffn, shrink, tiles
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.blocks import Limits
from molehill.kernels.triton.pack import CapacityError

CPU = torch.device("cpu")
LIMITS = Limits(
    adapters=3, tokens=64, slots=4, rank=64, experts=16, gates=48, pieces=3, memory=1 << 21
)
# Largest error over the largest value: sums in another order; and bf16's rounding of the rank rows.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"


@pytest.fixture(autouse=True)
def bfloat16_dot(monkeypatch) -> None:
    """Triton 3.9's interpreter keeps bfloat16 as uint16 and multiplies those integers in tl.dot.
    Widened to float32, products are what the hardware computes."""
    interpreted = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return interpreted(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


POLICIES = [
    Soft(),
    TopK(1),
    TopK(2),
    TopK(1, normalize=False),
    TopP(0.6),
    TopP(0.9, temperature=0.7),
    TopP(1.0),
    DynMoLE(),
    DynMoLE(top_p=0.3, keep_top_k=1, entropy_threshold=2.0),
    DynMoLE(entropy_type="renyi", entropy_index=0.5, entropy_threshold=0.8),
    DynMoLE(entropy_index=1.0, entropy_threshold=0.7),
    DynMoLE(top_p=0.5, keep_top_k=1, normalize_weights=True),
    DynMoLE(top_p=0.5, keep_top_k=1, include_crossing=True),
    DynMoLE(normalize_entropy=False, entropy_index=1.5, entropy_threshold=0.5),
]


def backend(limits: Limits = LIMITS) -> TritonBackend:
    return TritonBackend(CPU, limits)


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def experts(ranks: tuple[int, ...], features: int, out: int, seed: int = 0) -> Experts:
    total = sum(ranks)
    a = random(total, features, seed=seed, scale=features**-0.5)
    return Experts(a, random(out, total, seed=seed + 1, scale=total**-0.5), ranks)


def mixture(
    policy, ranks: tuple[int, ...], features: int, out: int, seed: int = 0
) -> LinearMixture:
    router = random(len(ranks), features, seed=seed + 2, scale=2 * features**-0.5)
    routed = not isinstance(policy, Constant)
    return LinearMixture(experts(ranks, features, out, seed), policy, router if routed else None)


def piece(own: LinearMixture, start: int = 0, site: str = "site") -> LinearPiece:
    return LinearPiece(site, start, own.experts, own.policy, own.router)


def rounded(own: LinearMixture, dtype: torch.dtype) -> LinearMixture:
    """What is served: A and B in the serving dtype."""
    a, b = own.experts.a.to(dtype).float(), own.experts.b.to(dtype).float()
    return replace(own, experts=Experts(a, b, own.experts.ranks))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected.float()).abs().max() / expected.abs().max()
    assert error < TOLERANCE[found.dtype], f"relative error {error:.2e}"


def check_linear(own: LinearMixture, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """One adapter on all rows but the first and the last, which are the base's."""
    features, out = own.experts.a.shape[1], own.experts.b.shape[0]
    limits = LIMITS if tokens <= LIMITS.tokens else replace(LIMITS, tokens=tokens)
    serving = backend(limits)
    handle = serving.register_linear(LinearShape("linear", features, out, dtype))
    serving.store(1, SlotWeights({handle: [piece(own)]}, {}))
    weight = random(out, features, seed=7, scale=features**-0.5).to(dtype)
    x = random(tokens, features, seed=8).to(dtype)
    y = (x.float() @ weight.float().T).to(dtype)
    base = y.clone()
    serving.begin_step([Run(1, 1, tokens - 1)])
    serving.linear(y, x, handle)
    expected, routing = definition.linear_mixture(x[1:-1], weight, None, rounded(own, dtype))
    assert_close(y[1:-1], expected)
    assert torch.equal(y[[0, -1]], base[[0, -1]])
    counters = serving.counters(1)
    assert counters.tokens == tokens - 2
    if own.router is None:
        assert counters.sites == {}
        return
    site = counters.sites["site"]
    assert site.decisions == tokens - 2
    assert site.expert_tokens == (routing.weights > 0).sum(0).tolist()
    assert site.soft == routing.soft.sum()
    assert math.isclose(site.entropy, routing.entropy.sum(), rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_policy_agrees_with_its_definition(policy) -> None:
    check_linear(mixture(policy, (4, 4, 4, 4, 4, 4), 40, 24), 18)


@pytest.mark.parametrize("policy", [Constant((1.0,)), Constant((0.25, 0.5, -1.0))], ids=repr)
def test_constant_weights_agree_with_their_definition(policy) -> None:
    check_linear(mixture(policy, (5, 2, 3)[: len(policy.weights)], 40, 24), 5)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_ties_go_to_the_lower_expert(policy) -> None:
    own = mixture(policy, (2, 2, 2, 2), 16, 16)
    router = own.router[[0, 1, 1, 0]] if own.router is not None else None
    check_linear(replace(own, router=router), 6)
    check_linear(replace(own, router=torch.zeros(4, 16)), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "out", "ranks"),
    [
        (3, 1, 1, (1,)),
        (5, 123, 123, (3, 1, 7)),
        (17, 64, 65, (16,) * 4),
        (3, 1100, 40, (2, 3)),
        (4, 33, 17, (1,) * 16),
        (19, 130, 70, (33,)),
    ],
)
def test_odd_shapes_agree_with_the_definition(tokens, features, out, ranks, dtype) -> None:
    check_linear(mixture(TopK(2), ranks, features, out), tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_steps_agree_with_the_definition(dtype) -> None:
    check_linear(mixture(TopK(2), (4, 3), 30, 20), tiles.DECODE_TOKENS + 5, dtype)


def test_more_rank_rows_and_routers_than_programs_agree_with_the_definition() -> None:
    """Programs take several blocks of rank rows and of router rows each."""
    limits = replace(LIMITS, rank=1024, gates=96, experts=32)
    owns = [mixture(TopK(3), (9,) * 32, 20, 24, seed=10 * i) for i in range(3)]
    serving = backend(limits)
    handle = serving.register_linear(LinearShape("qkv", 20, 72))
    pieces = [piece(own, 24 * i, str(i)) for i, own in enumerate(owns)]
    serving.store(0, SlotWeights({handle: pieces}, {}))
    x, y = random(4, 20, seed=8), torch.zeros(4, 72)
    serving.begin_step([Run(0, 0, 4)])
    serving.linear(y, x, handle)
    nothing = torch.zeros(24, 20)
    expected = [definition.linear_mixture(x, nothing, None, own)[0] for own in owns]
    assert_close(y, torch.cat(expected, dim=1))


@pytest.mark.skipif(not LONG, reason="minutes in the interpreter; MOLEHILL_LONG_TESTS=1 runs it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(
    ("tokens", "shape"), list(itertools.product((3, 17, 300), ((123, 123), (576, 192))))
)
def test_the_whole_matrix_agrees_with_the_definition(tokens, shape, policy, dtype) -> None:
    for ranks in ((1,), (8, 8, 8), (1, 5, 2, 9, 1, 1, 1, 3), (2,) * 16):
        if dtype == torch.float32 or len(ranks) == 3:
            check_linear(mixture(policy, ranks, *shape), tokens, dtype)


def test_fused_projections_keep_their_own_routers_and_columns() -> None:
    widths, features = (40, 24, 24), 48
    policies = (TopK(1), Constant((0.5, 0.5)), DynMoLE(top_p=0.5, keep_top_k=1))
    owns = [
        mixture(policy, (3, 2), features, width, seed=10 * i)
        for i, (policy, width) in enumerate(zip(policies, widths, strict=True))
    ]
    serving = backend()
    handle = serving.register_linear(LinearShape("qkv", features, sum(widths)))
    starts = [0, 40, 64]
    pieces = [piece(own, start, str(start)) for own, start in zip(owns, starts, strict=True)]
    serving.store(0, SlotWeights({handle: pieces}, {}))
    serving.store(2, SlotWeights({handle: pieces[2:]}, {}))
    weight = random(sum(widths), features, seed=7)
    x = random(9, features, seed=8)
    y = x @ weight.T
    expected = y.clone()
    serving.begin_step([Run(0, 0, 4), Run(2, 6, 9)])
    serving.linear(y, x, handle)
    for own, start, width in zip(owns, starts, widths, strict=True):
        columns = slice(start, start + width)
        rows = [slice(0, 4), slice(6, 9)] if start == 64 else [slice(0, 4)]
        for part in rows:
            expected[part, columns] = definition.linear_mixture(
                x[part], weight[columns], None, own
            )[0]
    assert_close(y, expected)
    assert torch.equal(y[4:6], expected[4:6])
    assert set(serving.counters(0).sites) == {"0", "64"}


def test_adapters_of_every_kind_share_a_batch() -> None:
    """Interleaved runs, unequal ranks, E and policies, base and padding rows, an unserved one."""
    features, out = 50, 36
    owns = {
        0: mixture(TopK(2), (1, 4, 2), features, out, seed=1),
        1: mixture(Soft(), (3,) * 16, features, out, seed=2),
        3: mixture(Constant((1.0,)), (5,), features, out, seed=3),
    }
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", features, out))
    for slot, own in owns.items():
        serving.store(slot, SlotWeights({handle: [piece(own)]}, {}))
    weight, bias = random(out, features, seed=7), random(out, seed=9)
    x = random(30, features, seed=8)
    y = x @ weight.T + bias
    expected = y.clone()
    runs = [Run(1, 0, 3), Run(0, 3, 4), Run(1, 5, 9), Run(UNSERVED, 9, 12), Run(3, 12, 20)]
    serving.begin_step([*runs, Run(0, 20, 23)])
    serving.linear(y, x, handle)
    for run in [*runs, Run(0, 20, 23)]:
        part = slice(run.start, run.stop)
        expected[part] = 0
        if run.slot in owns:
            expected[part] = definition.linear_mixture(x[part], weight, bias, owns[run.slot])[0]
    assert_close(y, expected)
    assert torch.equal(y[23:], expected[23:])
    assert y[9:12].count_nonzero() == 0


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("policy", [Constant((1.0, 0.5)), TopK(1), Soft()], ids=repr)
def test_output_scales_agree_with_the_formula(policy, with_bias) -> None:
    own = mixture(policy, (2, 3), 20, 26)
    scale = 1 + random(2, 26, seed=4, scale=0.3)
    weight, bias = random(26, 20, seed=7), random(26, seed=9) if with_bias else None
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 20, 30))
    scaled = replace(piece(own, start=4), output_scale=scale, bias=bias)
    serving.store(0, SlotWeights({handle: [scaled]}, {}))
    x = random(6, 20, seed=8)
    base = x @ weight.T
    y = torch.cat([torch.ones(6, 4), base if bias is None else base + bias], dim=1)
    serving.begin_step([Run(0, 0, 6)])
    serving.linear(y, x, handle)
    w = definition.route(x, own.router, policy, 2).weights
    rows = (x @ own.experts.a.T) * w[:, own.experts.expert_of_row]
    expected = base * (w @ scale) + rows @ own.experts.b.T
    assert_close(y[:, 4:], expected if bias is None else expected + bias)
    assert torch.equal(y[:, :4], torch.ones(6, 4))


def ffn_setup(d: int, width: int, dtype: torch.dtype, limits: Limits = LIMITS):
    serving = backend(limits)
    up = serving.register_linear(LinearShape("gate_up", d, 2 * width, dtype))
    down = serving.register_linear(LinearShape("down", width, d, dtype))
    return serving, serving.register_ffn(FfnShape("mlp", up, down, width)), (up, down)


def run_ffn(serving, handle, linears, weights, x, bias=None, activation="silu"):
    """The base's FFN with the backend's ops where the engine's hooks put them."""
    gate_up = x @ torch.cat([weights["gate_proj"], weights["up_proj"]]).T
    serving.linear(gate_up, x, linears[0])
    gate, up = gate_up.chunk(2, dim=1)
    h = ACTIVATIONS[activation](gate) * up
    serving.ffn(h, gate_up, handle)
    y = h @ weights["down_proj"].T
    y = y if bias is None else y + bias
    serving.linear(y, h, linears[1])
    return y


def ffn_piece(own: FfnMixture, bias=None, activation="silu") -> FfnPiece:
    gate, up, down = (own.experts.get(f"{name}_proj") for name in ("gate", "up", "down"))
    return FfnPiece("mlp", own.policy, own.router, activation, gate, up, down, bias)


def ffn_experts(names, d: int, width: int, count: int) -> dict[str, Experts]:
    shapes = {"gate_proj": (d, width), "up_proj": (d, width), "down_proj": (width, d)}
    ranks = {"gate_proj": (3, 1, 2, 4), "up_proj": (2, 2, 1, 1), "down_proj": (1, 17, 2, 3)}
    return {name: experts(ranks[name][:count], *shapes[name], seed=len(name)) for name in names}


def ffn_weights(d: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "gate_proj": random(width, d, seed=20, scale=d**-0.5).to(dtype),
        "up_proj": random(width, d, seed=21, scale=d**-0.5).to(dtype),
        "down_proj": random(d, width, seed=22, scale=width**-0.5).to(dtype),
    }


@pytest.mark.parametrize(
    ("names", "policy", "dtype"),
    [
        (("gate_proj", "up_proj", "down_proj"), TopK(2), torch.float32),
        (("gate_proj", "up_proj", "down_proj"), TopK(2), torch.bfloat16),
        (("gate_proj", "down_proj"), TopP(0.5), torch.float32),
        (("up_proj",), TopK(1, normalize=False), torch.float32),
        (("down_proj",), Soft(), torch.float32),
        ((), TopP(0.4), torch.float32),
    ],
    ids=str,
)
def test_ffn_mixtures_agree_with_the_definition(names, policy, dtype) -> None:
    d, width, tokens = 24, 70, 7
    weights, bias = ffn_weights(d, width, dtype), random(d, seed=23).to(dtype)
    own = FfnMixture(ffn_experts(names, d, width, 4), policy, random(4, d, seed=24))
    serving, handle, linears = ffn_setup(d, width, dtype)
    serving.store(2, SlotWeights({}, {handle: ffn_piece(own, bias.float())}))
    x = random(tokens, d, seed=25).to(dtype)
    serving.begin_step([])
    base = run_ffn(serving, handle, linears, weights, x, bias)
    serving.begin_step([Run(2, 0, 4), Run(UNSERVED, 4, 5)])
    y = run_ffn(serving, handle, linears, weights, x, bias)
    biases = {"gate_proj": None, "up_proj": None, "down_proj": bias}
    expected, routing = definition.ffn_mixture(x[:4], weights, biases, "silu", own)
    assert_close(y[:4], expected)
    assert torch.equal(y[5:], base[5:])
    assert y[4].count_nonzero() == 0
    site = serving.counters(2).sites["mlp"]
    assert site.expert_tokens == (routing.weights > 0).sum(0).tolist()
    assert site.decisions == 4


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_agrees_with_torch(activation) -> None:
    d, width = 16, 20
    weights = ffn_weights(d, width, torch.float32)
    own = FfnMixture(
        ffn_experts(("gate_proj",), d, width, 2), Soft(), random(2, d, seed=24), activation
    )
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    serving.store(0, SlotWeights({}, {handle: ffn_piece(own, activation=activation)}))
    x = random(3, d, seed=25)
    serving.begin_step([Run(0, 0, 3)])
    y = run_ffn(serving, handle, linears, weights, x, activation=activation)
    biases = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    assert_close(y, definition.ffn_mixture(x, weights, biases, activation, own)[0])


def test_an_ffn_mixture_and_linear_mixtures_live_in_one_ffn() -> None:
    d, width = 24, 40
    weights = ffn_weights(d, width, torch.float32)
    names = ("gate_proj", "up_proj", "down_proj")
    own = FfnMixture(ffn_experts(names, d, width, 3), TopK(2), random(3, d, seed=24))
    up, down = mixture(TopK(1), (2, 3), d, width, 30), mixture(Soft(), (1, 2), width, d, 40)
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    serving.store(0, SlotWeights({}, {handle: ffn_piece(own)}))
    pieces = {linears[0]: [piece(up, width, "up")], linears[1]: [piece(down, 0, "down")]}
    serving.store(1, SlotWeights(pieces, {}))
    serving.store(2, SlotWeights({linears[1]: [piece(down, 0, "down")]}, {handle: ffn_piece(own)}))
    x = random(9, d, seed=25)
    serving.begin_step([Run(0, 0, 3), Run(1, 3, 6), Run(2, 6, 9)])
    y = run_ffn(serving, handle, linears, weights, x)
    biases = dict.fromkeys(weights)
    whole = definition.ffn_mixture(x, weights, biases, "silu", own)[0]
    assert_close(y[:3], whole[:3])
    hidden = (
        torch.nn.functional.silu(x @ weights["gate_proj"].T)
        * (definition.linear_mixture(x, weights["up_proj"], None, up)[0])
    )
    expected = definition.linear_mixture(hidden, weights["down_proj"], None, down)[0]
    assert_close(y[3:6], expected[3:6])
    # Slot 2's linear mixture on down reads h = sum_e w_e u_e, which the definition keeps inside.
    w = definition.route(x, own.router, own.policy, 3).weights
    pairs = [own.experts[name].split() for name in names[:2]]
    h = torch.zeros(9, width)
    for e in range(3):
        gate, up_e = (
            x @ (weights[name] + split[e][1] @ split[e][0]).T
            for name, split in zip(names, pairs, strict=False)
        )
        h += w[:, e : e + 1] * torch.nn.functional.silu(gate) * up_e
    more = definition.linear_mixture(h, torch.zeros(d, width), None, down)[0]
    assert_close(y[6:], (whole + more)[6:])


def test_sharded_inputs_route_on_the_sum_of_all_ranks_logits() -> None:
    own, features, out = mixture(TopK(1), (2, 3), 40, 24), 40, 24
    x = random(5, features, seed=8)
    weight = random(out, features, seed=7)
    parts = slice(0, 24), slice(24, 40)

    def run(mine: slice, others: slice) -> torch.Tensor:
        def reduce(logits: torch.Tensor) -> torch.Tensor:
            total = logits.clone()
            total[0, :, :2] += x[:, others] @ own.router[:, others].T
            return total

        serving = backend()
        shape = LinearShape("o", mine.stop - mine.start, out, reduce=reduce)
        handle = serving.register_linear(shape)
        cut = Experts(own.experts.a[:, mine], own.experts.b, own.experts.ranks)
        cut_piece = LinearPiece("site", 0, cut, own.policy, own.router[:, mine])
        serving.store(0, SlotWeights({handle: [cut_piece]}, {}))
        y = x[:, mine] @ weight[:, mine].T
        serving.begin_step([Run(0, 0, 5)])
        serving.linear(y, x[:, mine].contiguous(), handle)
        return y

    y = run(*parts) + run(*reversed(parts))
    assert_close(y, definition.linear_mixture(x, weight, None, own)[0])


class Recorder:
    """A kernel that remembers its launches, as a CUDA graph does."""

    def __init__(self, kernel, graph: list) -> None:
        self.kernel, self.graph = kernel, graph

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.graph.append((self.kernel, grid, args, constants))
            return self.kernel[grid](*args, **constants)

        return launch


def test_launches_captured_before_any_adapter_serve_the_adapters_loaded_later(monkeypatch) -> None:
    """The same grids and addresses, replayed after loading, unloading and loading again."""
    d, width, tokens = 24, 40, 8
    weights = ffn_weights(d, width, torch.float32)
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    graph: list = []
    x, gate_up = random(tokens, d, seed=25), torch.zeros(tokens, 2 * width)
    h, y = torch.zeros(tokens, width), torch.zeros(tokens, d)
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "shrink_kernel", Recorder(shrink.shrink_kernel, graph))
        patch.setattr(expand, "expand_kernel", Recorder(expand.expand_kernel, graph))
        patch.setattr(ffn, "ffn_kernel", Recorder(ffn.ffn_kernel, graph))
        serving.begin_step([Run(UNSERVED, 0, tokens)])
        serving.linear(gate_up, x, linears[0])
        serving.ffn(h, gate_up, handle)
        serving.linear(y, h, linears[1])
    assert len(graph) == 5

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
        own = FfnMixture(ffn_experts(names, d, width, 3), TopK(1 + seed % 2), router)
        serving.store(seed % 2, SlotWeights({}, {handle: ffn_piece(own)}))
        serving.begin_step([Run(seed % 2, 2, 7)])
        found = replay()
        assert_close(found[2:7], definition.ffn_mixture(x[2:7], weights, biases, "silu", own)[0])
        serving.begin_step([])
        base = replay()
        assert torch.equal(base[:2], found[:2])
        assert not torch.allclose(base[2:7], found[2:7], atol=1e-3)
        serving.erase(seed % 2)


def test_a_step_without_adapters_launches_nothing(monkeypatch) -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    graph: list = []
    monkeypatch.setattr(shrink, "shrink_kernel", Recorder(shrink.shrink_kernel, graph))
    serving.begin_step([])
    serving.linear(torch.zeros(2, 16), torch.zeros(2, 16), handle)
    assert graph == []


def test_rows_of_a_shorter_forward_are_never_written_past_its_end() -> None:
    own = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    serving.store(0, SlotWeights({handle: [piece(own)]}, {}))
    serving.begin_step([Run(0, 0, 20)])
    memory = torch.zeros(20, 16)
    serving.linear(memory[:4], random(4, 16, seed=8), handle)
    assert memory[:4].count_nonzero() == 64
    assert memory[4:].count_nonzero() == 0


def test_inputs_and_outputs_may_be_parts_of_larger_tensors() -> None:
    own = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    serving.store(0, SlotWeights({handle: [piece(own)]}, {}))
    wide = random(4, 40, seed=8)
    serving.begin_step([Run(0, 0, 4)])
    for x in (wide[:, 5:21], random(16, 4, seed=9).T):
        memory = torch.zeros(4, 30)
        serving.linear(memory[:, 7:23], x, handle)
        expected = definition.linear_mixture(x, torch.zeros(16, 16), None, own)[0]
        assert_close(memory[:, 7:23], expected)
        assert memory[:, :7].count_nonzero() == memory[:, 23:].count_nonzero() == 0


def test_more_adapters_than_a_step_may_hold_are_zeroed_not_served_by_the_base() -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    for slot in range(4):
        own = mixture(Constant((1.0,)), (2,), 16, 16, seed=slot)
        serving.store(slot, SlotWeights({handle: [piece(own)]}, {}))
    y = torch.ones(5, 16)
    serving.begin_step([Run(slot, slot, slot + 1) for slot in range(4)])
    serving.linear(y, random(5, 16, seed=8), handle)
    assert y[3].count_nonzero() == 0
    assert y[:3].ne(1).any(dim=1).all()
    assert y[4].eq(1).all()


def test_an_erased_adapter_is_gone_and_its_memory_free() -> None:
    own = mixture(TopK(1), (2, 2), 16, 16)
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    free = serving.table.arena.free_bytes
    serving.store(0, SlotWeights({handle: [piece(own)]}, {}))
    assert serving.resident_bytes(0) == free - serving.table.arena.free_bytes > 0
    serving.erase(0)
    assert (serving.resident_bytes(0), serving.table.arena.free_bytes) == (0, free)
    y = torch.ones(2, 16)
    serving.begin_step([Run(0, 0, 1)])
    serving.linear(y, random(2, 16, seed=8), handle)
    assert y[0].count_nonzero() == 0
    assert y[1].eq(1).all()


def refused(own: LinearMixture, limits: Limits, error: type[Exception], match: str) -> None:
    serving = backend(limits)
    features, out = own.experts.a.shape[1], own.experts.b.shape[0]
    handle = serving.register_linear(LinearShape("layers.0.o", features, out))
    before = [t.clone() for t in (serving.table.heads, serving.table.arena.view(torch.uint8))]
    with pytest.raises(error, match=match):
        serving.store(0, SlotWeights({handle: [piece(own)]}, {}))
    after = [serving.table.heads, serving.table.arena.view(torch.uint8)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert serving.table.arena.free_bytes == serving.table.arena.budget
    assert serving.resident_bytes(0) == 0


def test_too_many_experts_are_refused_before_anything_is_written() -> None:
    own = mixture(Soft(), (1,) * 17, 16, 16)
    refused(own, LIMITS, CapacityError, "site: found 17 experts, expected at most 16")


def test_too_many_rank_rows_are_refused_before_anything_is_written() -> None:
    own = mixture(Soft(), (40, 30), 16, 16)
    refused(own, LIMITS, CapacityError, "layers.0.o: found 70 rank rows, expected at most 64")


def test_an_adapter_over_the_memory_is_refused_before_anything_is_written() -> None:
    own = mixture(Soft(), (8, 8), 64, 64)
    refused(own, replace(LIMITS, memory=4096), ArenaFullError, "found 4096 bytes free of 4096")


def test_a_slot_beyond_the_table_is_refused() -> None:
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    weights = SlotWeights({handle: [piece(mixture(Soft(), (1,), 16, 16))]}, {})
    with pytest.raises(CapacityError, match="found slot 4, expected less than 4"):
        serving.store(4, weights)
    serving.store(0, weights)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        serving.store(0, weights)


def test_a_routerless_mixture_needs_constant_weights() -> None:
    own = replace(mixture(Soft(), (1, 1), 16, 16), router=None)
    refused(own, LIMITS, TypeError, "site: a mixture without a router")


def test_traces_hold_what_the_kernels_routed() -> None:
    d, width = 16, 20
    serving, handle, linears = ffn_setup(d, width, torch.float32)
    own = FfnMixture(ffn_experts(("up_proj",), d, width, 3), TopK(2), random(3, d, seed=24))
    up = mixture(DynMoLE(), (2, 3), d, width, 30)
    weights = SlotWeights({linears[0]: [piece(up, width, "up")]}, {handle: ffn_piece(own)})
    serving.store(1, weights)
    x = random(6, d, seed=25)
    assert serving.trace(True) == []
    serving.begin_step([Run(1, 2, 5)])
    run_ffn(serving, handle, linears, ffn_weights(d, width, torch.float32), x)
    traces = {trace.site: trace for trace in serving.trace(False)}
    assert set(traces) == {"up", "mlp"}
    for site, router, policy in (("up", up.router, up.policy), ("mlp", own.router, own.policy)):
        expected = definition.route(x[2:5], router, policy, len(router))
        torch.testing.assert_close(traces[site].weights, expected.weights)
        torch.testing.assert_close(traces[site].entropy, expected.entropy)
    assert serving.trace(False) == []


@st.composite
def steps(draw) -> tuple[list[Run], int]:
    runs, row = [], 0
    for _ in range(draw(st.integers(0, 8))):
        row += draw(st.integers(0, 40))
        stop = row + draw(st.integers(1, 90))
        runs.append(Run(draw(st.sampled_from([0, 1, 2, 5, UNSERVED])), row, stop))
        row = stop
    return runs, row


@settings(max_examples=200, deadline=None)
@given(steps())
def test_tiles_cover_every_row_once_and_fit_the_grid(step) -> None:
    runs, tokens = step
    adapters, stored = 3, {0, 1, 2}
    table = tiles.table(runs, stored, adapters, tokens).tolist()
    assert len(table) <= tiles.buffer_size(max(tokens, 1), adapters + 1)
    wanted = {
        row: run.slot if run.slot in stored else UNSERVED
        for run in runs
        for row in range(run.start, run.stop)
    }
    for place, size in ((0, tiles.SMALL_TILE), (2, tiles.LARGE_TILE)):
        count, first = table[place : place + 2]
        assert count <= tiles.max_tiles(max(tokens, 1), adapters + 1, size)
        found = {}
        for i in range(first, first + 3 * count, 3):
            slot, start, rows = table[i : i + 3]
            assert 0 < rows <= size
            for row in table[table[4] + start : table[4] + start + rows]:
                assert row not in found
                found[row] = slot
        assert found == wanted


def test_the_grid_of_a_padded_step_has_room_for_every_shorter_one() -> None:
    for groups, size in ((1, 16), (4, 16), (9, 64)):
        bounds = [tiles.max_tiles(tokens, groups, size) for tokens in range(1, 400)]
        assert bounds == sorted(bounds)


def test_the_worked_example_of_the_tiles_holds(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "SMALL_TILE", 4)
    runs = [Run(2, 0, 5), Run(0, 5, 6), Run(2, 9, 11)]
    table = tiles.table(runs, {0, 2}, 3, 11).tolist()
    head = SimpleNamespace(small=table[0:2], order=table[4])
    assert table[head.order :] == [0, 1, 2, 3, 4, 9, 10, 5]
    first = head.small[1]
    assert head.small[0] == 3
    assert table[first : first + 9] == [2, 0, 4, 2, 4, 3, 0, 7, 1]
