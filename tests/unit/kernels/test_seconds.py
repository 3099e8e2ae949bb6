"""The ops' own stopwatch against one outside of them."""

from statistics import median
from time import perf_counter

import pytest
import torch

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    UNSERVED,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend

WIDTH, INNER, TOKENS = 256, 512, 64


def experts(inputs, outputs):
    return Experts(torch.randn(8, inputs), torch.randn(outputs, 8), (4, 4))


class Layer:
    """One FFN whose gate_up has a linear mixture in slot 0 and an FFN mixture in slot 1."""

    def __init__(self, backend):
        self.backend = backend
        self.gate_up = backend.register_linear(LinearShape("gate_up", WIDTH, 2 * INNER))
        self.down = backend.register_linear(LinearShape("down", INNER, WIDTH))
        self.ffn = backend.register_ffn(FfnShape("mlp", self.gate_up, self.down, INNER))
        router = torch.randn(2, WIDTH)
        linear = LinearPiece("gate", 0, experts(WIDTH, INNER), TopK(1), router)
        gate, down = experts(WIDTH, INNER), experts(INNER, WIDTH)
        ffn = FfnPiece("mlp", TopK(1), router, "silu", gate, None, down)
        backend.store(0, SlotWeights({self.gate_up: [linear]}, {}))
        backend.store(1, SlotWeights({}, {self.ffn: ffn}))

    def run(self, *runs):
        """Seconds that a forward takes, measured around its ops."""
        self.backend.begin_step(runs)
        x, gate_up = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, 2 * INNER)
        h, out = torch.randn(TOKENS, INNER), torch.randn(TOKENS, WIDTH)
        start = perf_counter()
        self.backend.linear(gate_up, x, self.gate_up)
        self.backend.ffn(h, gate_up, self.ffn)
        self.backend.linear(out, h, self.down)
        return perf_counter() - start


@pytest.fixture(params=[CpuBackend, TorchBackend])
def layer(request):
    return Layer(request.param())


def test_base_steps_take_no_adapter_seconds(layer):
    layer.run()
    assert layer.backend.seconds() == 0.0


@pytest.mark.parametrize("slot", [0, 1, UNSERVED])
def test_seconds_are_those_of_the_calls(layer, slot):
    shares = []
    for _ in range(50):
        before = layer.backend.seconds()
        wall = layer.run(Run(slot, 0, TOKENS))
        seconds = layer.backend.seconds() - before
        assert 0 < seconds <= wall
        shares.append(seconds / wall)
    if slot != UNSERVED:
        # What lies between the two stopwatches is the calls' overhead, and now and then whatever
        # else the machine does.
        assert median(shares) > 0.3
