"""FFN activations of vLLM that molehill's op computes, compiled and not; and which may be replaced.

There is no GPU: the backend is torch's, with an `activate` that does what the interface says.
"""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from support.backend_cases import assert_near, experts, random, router
from torch import nn
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.models.gemma2 import Gemma2MLP
from vllm.model_executor.models.llama import LlamaMLP

from molehill.engine.vllm.model import base_activations, discovery, hooks
from molehill.engine.vllm.model.base_activations import BaseActivations
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.interface import (
    ActivatingBackend,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    SlotWeights,
)
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend

INPUTS, WIDTH, ROWS = 12, 8, 7


class Activating(TorchBackend):
    """The torch backend, which adds to gate and up where it activates."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._x = torch.empty(0)

    def begin_linear(self, x: torch.Tensor, handle: int) -> None:
        self.calls.append("begin")
        self._x = x

    def finish_linear(self, out: torch.Tensor, x: torch.Tensor, handle: int) -> None:
        self.calls.append("finish")

    def activate(self, h: torch.Tensor, gate_up: torch.Tensor, handle: int) -> None:
        self.calls.append("activate")
        self.linear(gate_up, self._x, 0)
        gate, up = gate_up.chunk(2, dim=1)
        h.copy_(nn.functional.silu(gate) * up)


class Projection(nn.Linear):
    """Returns what a linear of vLLM does: its output, and a bias that was not added."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Mlp(nn.Module):
    """As LlamaMLP has it, without linears of vLLM."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = Projection(INPUTS, 2 * WIDTH, bias=False)
        self.act_fn = activation
        self.down_proj = Projection(WIDTH, INPUTS, bias=False)

    def between(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        h: torch.Tensor = self.act_fn(self.between(gate_up))
        return h


def configured(custom_ops: str) -> AbstractContextManager[None]:
    """Settings of vLLM under which its activations are its kernels ("all") or torch ("none")."""
    compilation = CompilationConfig(mode=CompilationMode.NONE, custom_ops=[custom_ops])
    return set_current_vllm_config(VllmConfig(compilation_config=compilation))


def ffn_of(module: nn.Module, child: str = "act_fn") -> discovery.Ffn:
    return discovery.Ffn("mlp", module, "mlp.gate_up_proj", "mlp.down_proj", child, "silu")


def test_only_a_backend_that_activates_is_one() -> None:
    assert isinstance(Activating(), ActivatingBackend)
    assert not isinstance(TorchBackend(), ActivatingBackend)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_op_activates_with_mixtures_where_there_are_adapters_and_as_the_base_elsewhere(
    compiled,
) -> None:
    with configured("none"):
        mlp = Mlp(SiluAndMul())
        weight = random(2 * WIDTH, INPUTS, seed=1)
        mlp.gate_up_proj.weight.data.copy_(weight)
        backend = Activating()
        linear = backend.register_linear(LinearShape("gate_up", INPUTS, 2 * WIDTH))
        down = backend.register_linear(LinearShape("down", WIDTH, INPUTS))
        activation = base_activations.describe("silu", mlp.act_fn)
        shape = FfnShape("mlp", linear, down, WIDTH, activation)
        handle = backend.register_ffn(shape)
        activations = BaseActivations(backend)
        activations.add(handle, activation, mlp.act_fn)
    hooks.replace_activation(ffn_of(mlp), handle, activations.op)
    activations.warm_up([(shape, torch.float32, torch.device("cpu"))])
    piece = LinearPiece(
        "up", WIDTH, experts(INPUTS, WIDTH, [2, 3], 4), TopK(1), router(2, INPUTS, 5)
    )
    backend.store(0, SlotWeights({linear: [piece]}, {}))
    torch._dynamo.reset()
    run = torch.compile(mlp, backend="aot_eager", fullgraph=True) if compiled else mlp
    x = random(1, ROWS, INPUTS, seed=3)

    def step(runs: list[Run]) -> torch.Tensor:
        backend.begin_step(runs)
        activations.begin_step(runs)
        backend.begin_linear(x[0], linear)
        with torch.inference_mode():
            h: torch.Tensor = run(x)
        return h

    base = x @ weight.T
    expected = nn.functional.silu(base[..., :WIDTH]) * base[..., WIDTH:]
    h = step([])
    assert h.shape == (1, ROWS, WIDTH)
    assert_near(h, expected, torch.float32)
    assert backend.calls == ["begin"]
    h = step([Run(0, 2, 5)])
    assert backend.calls == ["begin", "begin", "activate"]
    changed = base[0].clone()
    backend.linear(changed, x[0], linear)
    assert not torch.allclose(changed[2:5], base[0, 2:5], atol=0.1)
    expected[0] = nn.functional.silu(changed[:, :WIDTH]) * changed[:, WIDTH:]
    assert_near(h, expected, torch.float32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", SiluAndMul),
        ("gelu", GeluAndMul),
        ("gelu_pytorch_tanh", lambda: GeluAndMul(approximate="tanh")),
    ],
)
@pytest.mark.parametrize("custom_ops", ["all", "none"])
def test_a_plain_step_has_the_activation_of_the_base(name, kind, custom_ops) -> None:
    with configured(custom_ops):
        module = kind()
        activation = base_activations.describe(name, module)
        activations = BaseActivations(Activating())
        activations.add(3, activation, module)
    assert activation.is_rounded is (custom_ops == "all")
    gate_up = random(ROWS, 2 * WIDTH, seed=3)
    expected = ACTIVATIONS[name](gate_up[:, :WIDTH]) * gate_up[:, WIDTH:]
    assert_near(activations.op(gate_up, torch.tensor([3])), expected, torch.float32)


class Clamped(Mlp):
    def between(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up.clamp(max=1)


class Split(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        return self.act_fn(gate_up[:, :2]) + self.act_fn(gate_up[:, 2:])


@pytest.mark.parametrize("kind", [LlamaMLP, Gemma2MLP])
def test_ffns_of_vllm_activate_what_their_gate_up_linear_returned(kind) -> None:
    mlp = kind.__new__(kind)
    nn.Module.__init__(mlp)
    mlp.gate_up_proj, mlp.act_fn, mlp.down_proj = nn.Identity(), nn.Identity(), nn.Identity()
    children = dict(mlp.named_children())
    assert discovery.activates_gate_up(ffn_of(mlp))
    assert dict(mlp.named_children()) == children


@pytest.mark.parametrize("kind", [Clamped, Split])
def test_an_ffn_with_something_between_keeps_its_activation(kind) -> None:
    assert not discovery.activates_gate_up(ffn_of(kind(nn.Identity())))
