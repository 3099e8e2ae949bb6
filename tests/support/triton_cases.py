"""Adapters, layers and tolerances of the Triton tests."""

from dataclasses import replace

import torch

from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.interface import FfnPiece, FfnShape, LinearPiece, LinearShape
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.launch_config import Capacity
from support import native

CPU = torch.device("cpu")
CAPACITY = Capacity(
    adapters=3, tokens=64, slots=4, rank=64, experts=16, gates=48, pieces=3, memory=1 << 21
)


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def backend(capacity: Capacity = CAPACITY) -> TritonBackend:
    """In the interpreter, or natively where there is a GPU; see the fixture `interpreted`."""
    return (
        native.NativeTritonBackend(capacity) if native.is_here() else TritonBackend(CPU, capacity)
    )


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def experts(ranks: tuple[int, ...], features: int, out: int, seed: int = 0) -> Experts:
    total = sum(ranks)
    a = random(total, features, seed=seed, scale=features**-0.5)
    return Experts(a, random(out, total, seed=seed + 1, scale=max(total, 1) ** -0.5), ranks)


def mixture(
    policy, ranks: tuple[int, ...], features: int, out: int, seed: int = 0
) -> LinearMixture:
    router = random(len(ranks), features, seed=seed + 2, scale=2 * features**-0.5)
    routed = not isinstance(policy, Constant)
    return LinearMixture(experts(ranks, features, out, seed), policy, router if routed else None)


def piece(mixture: LinearMixture, start: int = 0, site: str = "site") -> LinearPiece:
    return LinearPiece(site, start, mixture.experts, mixture.policy, mixture.router)


def rounded(mixture: LinearMixture, dtype: torch.dtype) -> LinearMixture:
    """What is served: A and B in the serving dtype."""
    a, b = mixture.experts.a.to(dtype).float(), mixture.experts.b.to(dtype).float()
    return replace(mixture, experts=Experts(a, b, mixture.experts.ranks))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected.float()).abs().max() / expected.abs().max()
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


def ffn_setup(d: int, width: int, dtype: torch.dtype, capacity: Capacity = CAPACITY):
    serving = backend(capacity)
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


def run_ffn_biased(serving, handle, linears, weights, biases, x):
    """As `run_ffn`, with a bias, or None, on every projection."""

    def base(name, value):
        y = value.float() @ weights[name].float().T
        return (y if biases[name] is None else y + biases[name]).to(x.dtype)

    gate_up = torch.cat([base("gate_proj", x), base("up_proj", x)], dim=1)
    serving.linear(gate_up, x, linears[0])
    gate, up = gate_up.chunk(2, dim=1)
    h = ACTIVATIONS["silu"](gate) * up
    serving.ffn(h, gate_up, handle)
    y = base("down_proj", h)
    serving.linear(y, h, linears[1])
    return y


def ffn_piece(mixture: FfnMixture, bias=None, activation="silu") -> FfnPiece:
    gate, up, down = (mixture.experts.get(f"{name}_proj") for name in ("gate", "up", "down"))
    return FfnPiece("mlp", mixture.policy, mixture.router, activation, gate, up, down, bias)


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
