"""The C++ backend's experts inside an FFN against the definition."""

import dataclasses
import itertools

import pytest
import torch
from support.backend_cases import TOLERANCE, assert_near, experts, random, rounded, router
from support.cpu_cases import thread_count

from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import FfnPiece, FfnShape, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import FfnMixture
from molehill.kernels.policy import DynMoLE, TopK, TopP
from molehill.kernels.reference import ffn_mixture

WIDTHS = {"gate": (36, 76), "up": (36, 76), "down": (76, 36)}


def run_ffn(piece, activation, rows, dtype, isa=None, biased=True, widths=WIDTHS):
    """The backend's ops around base GEMMs, as a model calls them; and the definition's y."""
    d, intermediate = widths["gate"]
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    weights = {
        name: random(widths[short][1], widths[short][0], seed=i, scale=0.15).to(dtype).float()
        for i, (name, short) in enumerate(names.items())
    }
    biases = {
        name: random(weight.shape[0], seed=20 + i) if biased else None
        for i, (name, weight) in enumerate(weights.items())
    }
    piece = dataclasses.replace(piece, bias=biases["down_proj"])
    backend = CpuBackend(isa=isa)
    gate_up = backend.register_linear(LinearShape("gate_up", d, 2 * intermediate, dtype))
    down = backend.register_linear(LinearShape("down", intermediate, d, dtype))
    ffn = backend.register_ffn(FfnShape("mlp", gate_up, down, intermediate))
    backend.store(0, SlotWeights({}, {ffn: piece}))
    x = random(rows + 2, d, seed=30).to(dtype)
    act = ACTIVATIONS[activation]

    def base(name, value):
        bias = biases[name]
        return (value.float() @ weights[name].T + (0 if bias is None else bias)).to(dtype)

    pre = torch.cat([base("gate_proj", x), base("up_proj", x)], dim=1)
    backend.begin_step([Run(0, 1, rows + 1)])
    backend.linear(pre, x, gate_up)
    h = (act(pre[:, :intermediate].float()) * pre[:, intermediate:].float()).to(dtype)
    plain = h.clone()
    backend.ffn(h, pre, ffn)
    y = base("down_proj", h)
    before = y.clone()
    backend.linear(y, h, down)
    for edge in (0, rows + 1):
        assert torch.equal(h[edge], plain[edge])
        assert torch.equal(y[edge], before[edge])
    mixture = FfnMixture(
        {
            name: rounded(pair, dtype)
            for name, short in names.items()
            if (pair := getattr(piece, short)) is not None
        },
        piece.policy,
        piece.router,
        activation,
    )
    expected = ffn_mixture(x.float(), weights, biases, "relu", mixture)[0]
    return y[1:-1], expected[1:-1], backend


def ffn_piece(present, policy, activation="silu", widths=WIDTHS, ranks=(4, 8, 3)):
    pairs = {
        name: experts(widths[name][0], widths[name][1], ranks, seed=i)
        for i, name in enumerate(widths)
        if name in present
    }
    pairs = {name: pairs.get(name) for name in widths}
    return FfnPiece("mlp", policy, router(len(ranks), widths["gate"][0]), activation, **pairs)


SUBSETS = [c for n in range(4) for c in itertools.combinations(WIDTHS, n)]


@pytest.mark.parametrize("present", SUBSETS, ids="_".join)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_inside_an_ffn_give_the_definition(present, dtype):
    for policy in (TopK(2), TopP(0.5)):
        y, expected, _ = run_ffn(ffn_piece(present, policy), "silu", 9, dtype)
        assert_near(y, expected, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gives_the_definition(activation):
    piece = ffn_piece(WIDTHS, TopK(2), activation)
    y, expected, _ = run_ffn(piece, activation, 40, torch.float32)
    assert_near(y, expected, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 301])
def test_ffn_on_every_instruction_set_and_thread_count(isa, threads, dtype, rows):
    piece = ffn_piece(WIDTHS, DynMoLE())
    y, expected, backend = run_ffn(piece, "silu", rows, dtype, isa, biased=False)
    assert_near(y, expected, dtype)
    assert backend.counters(0).sites["mlp"].decisions == rows


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_of_a_large_ffn_are_shared_out_by_weights(isa, rows):
    widths = {"gate": (70, 700), "up": (70, 700), "down": (700, 70)}
    piece = ffn_piece(widths, TopK(3), widths=widths, ranks=[32] * 8)
    for threads in (1, 3):
        with thread_count(threads):
            y, expected, _ = run_ffn(piece, "silu", rows, torch.float32, isa, widths=widths)
            assert_near(y, expected, torch.float32)
