"""Weights that do not fit their layers: every backend refuses them, in the same words."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from support.backend_cases import experts, random, router
from support.triton_cases import CAPACITY

from molehill.kernels.checks import WeightsError
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    ExpertScale,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    MoePiece,
    MoeShape,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.policy import AdaMoLE, Constant, FlyLoRA, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.triton.backend import TritonBackend

D, INNER, OUT = 16, 24, 20
Q = "layers.0.self_attn.q_proj"
MLP = "layers.0.mlp"


class Served(NamedTuple):
    """A backend with a linear of D inputs and 2 * OUT outputs and an FFN; their handles."""

    backend: Any
    linear: int
    ffn: int


def serve(make: Callable[[], Any]) -> Served:
    backend = make()
    linear = backend.register_linear(LinearShape("layers.0.self_attn.qkv_proj", D, 2 * OUT))
    gate_up = backend.register_linear(LinearShape("layers.0.mlp.gate_up_proj", D, 2 * INNER))
    down = backend.register_linear(LinearShape("layers.0.mlp.down_proj", INNER, D))
    return Served(backend, linear, backend.register_ffn(FfnShape(MLP, gate_up, down, INNER)))


def triton() -> TritonBackend:
    return TritonBackend(torch.device("cpu"), CAPACITY)


@pytest.fixture(params=[CpuBackend, TorchBackend, triton], ids=["cpu", "torch", "triton"])
def served(request) -> Served:
    return serve(request.param)


def linear(**changes: Any) -> LinearPiece:
    good = LinearPiece(Q, 0, experts(D, OUT, [2, 3]), Soft(), router(2, D))
    return replace(good, **changes)


def ffn(**changes: Any) -> FfnPiece:
    pairs = {
        "gate": experts(D, INNER, [1, 2]),
        "up": experts(D, INNER, [2, 2]),
        "down": experts(INNER, D, [3, 1]),
    }
    return replace(FfnPiece(MLP, TopK(1), router(2, D), "silu", **pairs), **changes)


def cut(pair: Any, **halves: torch.Tensor) -> Any:
    return replace(pair, **halves)


GOOD, LEARNED = linear(), AdaMoLE(0.2)
PAIR = GOOD.experts
# By message: a piece of the linear.
LINEARS: dict[str, LinearPiece] = {
    f"{Q}: a: found (5, 15), expected (5, 16)": linear(experts=cut(PAIR, a=random(5, D - 1))),
    f"{Q}: a: found (4, 16), expected (5, 16)": linear(experts=cut(PAIR, a=random(4, D))),
    f"{Q}: b: found (20, 6), expected (20, 5)": linear(experts=cut(PAIR, b=random(OUT, 6))),
    f"{Q}: b: found (100,), expected 2 dimensions": linear(experts=cut(PAIR, b=random(100))),
    f"{Q}: a: found torch.int64, expected a floating-point dtype": linear(
        experts=cut(PAIR, a=torch.ones(5, D, dtype=torch.int64))
    ),
    f"{Q}: ranks: found (7, -2), expected none below 0": linear(experts=cut(PAIR, ranks=(7, -2))),
    f"{Q}: found columns 21 to 41, expected at most 40 of layers.0.self_attn.qkv_proj": linear(
        start=OUT + 1
    ),
    f"{Q}: found columns -1 to 19, expected at most 40": linear(start=-1),
    f"{Q}: router: found (3, 16), expected (2, 16)": linear(router=router(3, D)),
    f"{Q}: router: found (2, 15), expected (2, 16)": linear(router=router(2, D - 1)),
    f"{Q}: router: found torch.float64, expected torch.float32": linear(
        router=router(2, D).double()
    ),
    f"{Q}: output_scale: found (2, 19), expected (2, 20)": linear(output_scale=random(2, OUT - 1)),
    f"{Q}: bias: found (40,), expected (20,)": linear(
        output_scale=random(2, OUT), bias=random(2 * OUT)
    ),
    f"shared pair of {Q}: a: found (1, 9), expected (1, 16)": linear(shared=experts(9, OUT, [1])),
    f"shared pair of {Q}: b: found (19, 1), expected (20, 1)": linear(
        shared=experts(D, OUT - 1, [1])
    ),
    f"{Q}: shared pair: found no router, expected one beside it": linear(
        router=None, policy=Constant((1.0, 1.0)), shared=experts(D, OUT, [1])
    ),
    f"{Q}: router: found none, expected 2 rows for the policy Soft()": linear(router=None),
    f"{Q}: router: found none, expected 3 rows for the policy AdaMoLE(max_threshold=0.2)": linear(
        router=None, policy=LEARNED, parameters=random(1)
    ),
    f"{Q}: router: found one beside constant weights, expected none": linear(
        policy=Constant((0.5, 0.5))
    ),
    f"{Q}: constant weights: found 3, expected 2": linear(
        router=None, policy=Constant((1.0, 1.0, 1.0))
    ),
    f"{Q}: experts of the policy: found 3, expected 2": linear(
        policy=FlyLoRA(1, experts=3), parameters=random(3)
    ),
    f"{Q}: router: found (2, 16), expected (3, 16)": linear(policy=LEARNED, parameters=random(1)),
    f"{Q}: parameters: found None, expected (1,)": linear(policy=LEARNED, router=router(3, D)),
    f"{Q}: parameters: found (2,), expected (1,)": linear(
        policy=LEARNED, router=router(3, D), parameters=random(2)
    ),
    f"{Q}: parameters: found (1,), expected None": linear(parameters=random(1)),
}
# By message: a piece of the FFN.
FFNS: dict[str, FfnPiece] = {
    f"{MLP}.gate_proj: a: found (3, 15), expected (3, 16)": ffn(gate=experts(D - 1, INNER, [1, 2])),
    f"{MLP}.up_proj: b: found (23, 4), expected (24, 4)": ffn(up=experts(D, INNER - 1, [2, 2])),
    f"{MLP}.down_proj: a: found (4, 23), expected (4, 24)": ffn(down=experts(INNER - 1, D, [3, 1])),
    f"{MLP}.down_proj: experts: found 3, expected 2": ffn(down=experts(INNER, D, [3, 1, 1])),
    f"{MLP}: router: found (2, 24), expected (2, 16)": ffn(router=router(2, INNER)),
    f"{MLP}: router: found (32,), expected 2 dimensions": ffn(router=random(32)),
    f"{MLP}: router: found one beside constant weights, expected none": ffn(
        policy=Constant((0.5, 0.5))
    ),
    f"{MLP}: activation: found 'tanhshrink', expected ['gelu',": ffn(activation="tanhshrink"),
    f"{MLP}: bias: found (24,), expected (16,)": ffn(bias=random(INNER)),
    f"{MLP}.gate_proj: factors: found (1, 24), expected (2, 24)": ffn(
        gate_scale=ExpertScale(random(1, INNER))
    ),
    f"{MLP}.up_proj: bias: found (16,), expected (24,)": ffn(
        up_scale=ExpertScale(random(2, INNER), random(D))
    ),
}


def refused(served: Served, weights: SlotWeights, message: str) -> None:
    """By `pack` and by `store`; the slot stays empty, and takes what fits."""
    for give in (served.backend.pack, lambda weights: served.backend.store(0, weights)):
        with pytest.raises(WeightsError) as caught:
            give(weights)
        assert str(caught.value).startswith(message)
    assert served.backend.resident_bytes(0) == 0
    served.backend.store(0, SlotWeights({served.linear: [linear()]}, {served.ffn: ffn()}))


@pytest.mark.slow
@pytest.mark.parametrize("message", LINEARS)
def test_a_linears_weights_that_do_not_fit(served, message):
    refused(served, SlotWeights({served.linear: [LINEARS[message]]}, {}), message)


@pytest.mark.parametrize("message", FFNS)
def test_an_ffns_weights_that_do_not_fit(served, message):
    refused(served, SlotWeights({}, {served.ffn: FFNS[message]}), message)


def test_pieces_that_write_the_same_columns(served):
    other = replace(linear(start=OUT - 1), site="layers.0.self_attn.k_proj")
    weights = SlotWeights({served.linear: [linear(), other]}, {})
    message = f"layers.0.self_attn.k_proj: found columns from 19, expected from 20, where {Q} ends"
    refused(served, weights, message)


def test_handles_that_nobody_registered(served):
    beyond = 1 << 40
    for weights, message in (
        (SlotWeights({beyond: [linear()]}, {}), f"{Q}: found handle {beyond}, expected a reg"),
        (
            SlotWeights({}, {beyond: ffn()}),
            f"{MLP}: found handle {beyond}, expected a registered F",
        ),
    ):
        with pytest.raises(WeightsError) as caught:
            served.backend.pack(weights)
        assert str(caught.value).startswith(message)


def vectors(**changes: Any) -> ScalePiece:
    return replace(ScalePiece(Q, Soft(), router(3, 10), random(4, 3, 10)), **changes)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (vectors(start=1), f"{Q}: found columns 1 to 41, expected at most 40"),
        (vectors(router=router(3, 9)), f"{Q}: router: found (3, 9), expected (3, 10)"),
        (vectors(vectors=random(12, 10)), f"{Q}: vectors: found (12, 10), expected 3 dimensions"),
        (vectors(policy=LEARNED), f"{Q}: policy: found AdaMoLE(max_threshold=0.2), expected one"),
        (vectors(policy=Constant((1.0,) * 3)), f"{Q}: router: found one beside constant weights"),
    ],
)
def test_vectors_that_do_not_fit(served, piece, message):
    refused(served, SlotWeights({}, {}, {served.linear: [piece]}), message)


def test_an_ffns_vectors_are_one_head(served):
    message = f"{Q}: vectors: found (4, 10), expected (1, 24)"
    refused(served, SlotWeights({}, {}, {}, {served.ffn: vectors()}), message)


@pytest.mark.parametrize("make", [CpuBackend, TorchBackend, triton])
def test_an_ffn_whose_linears_do_not_fit_it(make):
    backend = make()
    gate_up = backend.register_linear(LinearShape("gate_up", D, 2 * INNER))
    down = backend.register_linear(LinearShape("down", INNER, D))
    with pytest.raises(WeightsError, match="gate_up: out_features: found 48, expected 46"):
        backend.register_ffn(FfnShape(MLP, gate_up, down, INNER - 1))
    with pytest.raises(WeightsError, match=f"{MLP}: down: found {1 << 40}, expected"):
        backend.register_ffn(FfnShape(MLP, gate_up, 1 << 40, INNER))


def moe(**changes: Any) -> MoePiece:
    pairs = (experts(D, INNER, [1, 0]), experts(D, INNER, [2, 1]), experts(INNER, D, [0, 3]))
    return replace(MoePiece(MLP, *pairs), **changes)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (moe(gate=experts(D - 1, INNER, [1, 0])), f"{MLP}.gate_proj: a: found (1, 15), expected "),
        (moe(up=experts(D, INNER + 1, [1, 1])), f"{MLP}.up_proj: b: found (25, 2), expected (24,"),
        (moe(down=experts(INNER, D, [1])), f"{MLP}.down_proj: experts: found 1, expected 2"),
        (moe(down=cut(experts(INNER, D, [1, 1]), ranks=(1, 2))), f"{MLP}.down_proj: a: found (2, "),
    ],
)
def test_lora_on_experts_that_does_not_fit(piece, message):
    blocks = MoeBlocks()
    shape = MoeShape(MLP, 2, "silu", None, None, hidden=D, intermediate=INNER)
    handle = blocks.register(shape)
    with pytest.raises(WeightsError) as caught:
        blocks.store(0, {handle: piece})
    assert str(caught.value).startswith(message)
    assert blocks.resident_bytes(0) == 0
    blocks.store(0, {handle: moe()})


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(WeightsError(f"{Q}: a", (1, 2), (1, 3))))
    assert str(error) == f"{Q}: a: found (1, 2), expected (1, 3)"
    assert isinstance(error, ValueError)
