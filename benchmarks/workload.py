"""What the kernel benchmark runs: the layers of SmolLM2-135M in bfloat16 under random adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.kernels.interface import FfnPiece, LinearPiece, Run
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import DynMoLE, Policy

DTYPE = torch.bfloat16
HIDDEN, INTERMEDIATE, LAYERS = 576, 1536, 30
# Fused linears: input width, and the output widths of the projections.
LINEARS = {
    "qkv": (HIDDEN, (576, 192, 192)),
    "o": (HIDDEN, (576,)),
    "gate_up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
# The fused linears that an op touches; `ffn` is an FFN mixture, the others are linear mixtures.
OPS = {
    "layer": tuple(LINEARS),
    **{name: (name,) for name in LINEARS},
    "ffn": ("gate_up", "down"),
}
DYNMOLE = DynMoLE()
# Standard deviation of the router logits: about two experts of eight are chosen by DynMoLE.
LOGITS = 3.0


@dataclass(frozen=True)
class Point:
    """One measurement: an op of every layer on a batch whose tokens the adapters share evenly.

    rank: of one expert. Every projection has `experts` experts of it.
    """

    op: str = "layer"
    tokens: int = 32
    experts: int = 8
    rank: int = 8
    policy: Policy = DYNMOLE
    adapters: int = 1

    @property
    def is_ffn(self) -> bool:
        return self.op == "ffn"

    @property
    def runs(self) -> list[Run]:
        """Adapter i sits in slot i and owns one stretch of the batch."""
        edges = [i * self.tokens // self.adapters for i in range(self.adapters + 1)]
        return [Run(i, edges[i], edges[i + 1]) for i in range(self.adapters)]


@dataclass(frozen=True)
class AdapterLayer:
    """What an adapter does to one layer: pieces by fused linear, or one FFN mixture."""

    linears: Mapping[str, Sequence[LinearPiece]]
    ffn: FfnPiece | None = None


def make_layers(point: Point, depth: int) -> list[AdapterLayer]:
    """Random weights for the mixtures of `point`, in float32; no two layers are alike."""
    if point.is_ffn:
        return [AdapterLayer({}, _ffn_piece(point)) for _ in range(depth)]
    return [
        AdapterLayer({name: _linear_pieces(name, point) for name in LINEARS}) for _ in range(depth)
    ]


def make_inputs(tokens: int) -> dict[int, Tensor]:
    """Activations `[tokens, width]` by width, an FFN's pre-activations too."""
    return {width: random(tokens, width) for width in (HIDDEN, INTERMEDIATE, 2 * INTERMEDIATE)}


def random(*shape: int) -> Tensor:
    """Standard normal values in the activations' dtype."""
    values: Tensor = torch.randn(*shape, dtype=DTYPE)
    return values


def _experts(inputs: int, outputs: int, point: Point) -> Experts:
    rank = point.experts * point.rank
    # A small B keeps the outputs, to which every repetition adds, finite.
    a, b = torch.randn(rank, inputs) / math.sqrt(inputs), torch.randn(outputs, rank) * 1e-3
    return Experts(a, b, (point.rank,) * point.experts)


def _router(inputs: int, experts: int) -> Tensor:
    return torch.randn(experts, inputs) * (LOGITS / math.sqrt(inputs))


def _linear_pieces(name: str, point: Point) -> list[LinearPiece]:
    inputs, outputs = LINEARS[name]
    routed = point.policy.constant_weights is None
    return [
        LinearPiece(
            f"{name}.{i}",
            sum(outputs[:i]),
            _experts(inputs, width, point),
            point.policy,
            _router(inputs, point.experts) if routed else None,
        )
        for i, width in enumerate(outputs)
    ]


def _ffn_piece(point: Point) -> FfnPiece:
    gate, up = (_experts(HIDDEN, INTERMEDIATE, point) for _ in range(2))
    down = _experts(INTERMEDIATE, HIDDEN, point)
    router = _router(HIDDEN, point.experts)
    return FfnPiece("mlp", point.policy, router, "silu", gate, up, down)
