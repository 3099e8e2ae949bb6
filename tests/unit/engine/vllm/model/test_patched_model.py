"""How a vLLM model is hooked for a backend that has the base's GEMMs and activations in its ops.

There is no GPU: torch does what such a backend does, on one stream.
"""

from typing import Any

import pytest
import torch
from support.backend_cases import assert_near, experts, random, router
from support.golden import TINY_LLAMA
from support.streams import OneStream
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import initialize_model

from molehill.engine.vllm.model import patched_model
from molehill.engine.vllm.model.hooks import MixedActivation, ReplacedActivation
from molehill.engine.vllm.model.patched_model import PatchedModel
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.interface import FfnShape, LinearPiece, Run, SlotWeights
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.policy import TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.vocabulary import Vocabulary

CPU = torch.device("cpu")


class Activating(TorchBackend):
    """The torch backend in halves, which adds to gate and up where it activates."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, FfnShape] = {}
        self.activated = 0
        self._inputs: dict[int, torch.Tensor] = {}

    def register_ffn(self, shape: FfnShape) -> int:
        handle = super().register_ffn(shape)
        self.shapes[handle] = shape
        return handle

    def begin_linear(self, x: torch.Tensor, handle: int) -> None:
        self._inputs[handle] = x

    def finish_linear(self, out: torch.Tensor, x: torch.Tensor, handle: int) -> None:
        if handle not in {s.gate_up for s in self.shapes.values() if s.activation is not None}:
            super().linear(out, x, handle)

    def linear(self, out: torch.Tensor, x: torch.Tensor, handle: int) -> None:
        self.begin_linear(x, handle)
        self.finish_linear(out, x, handle)

    def activate(self, h: torch.Tensor, gate_up: torch.Tensor, handle: int) -> None:
        self.activated += 1
        shape = self.shapes[handle]
        assert shape.activation is not None
        super().linear(gate_up, self._inputs[shape.gate_up], shape.gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        h.copy_(ACTIVATIONS[shape.activation.name](gate) * up)
        self.ffn(h, gate_up, handle)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    """Of the tiny Llama, with this process as the only rank."""
    arguments = EngineArgs(str(TINY_LLAMA), dtype="float32", compilation_config={"mode": 0})
    settings = arguments.create_engine_config()
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel()
        yield settings
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def model(config, monkeypatch):
    monkeypatch.setattr(patched_model, "SideStream", lambda device: OneStream())
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    # One model after another: its layers have the same names.
    config.compilation_config.static_forward_context.clear()
    model = initialize_model(vllm_config=config)
    for seed, module in enumerate(model.modules()):
        if isinstance(module, LinearBase):
            scale = module.input_size**-0.5
            module.weight.data.copy_(random(*module.weight.shape, seed=seed, scale=scale))
            module.quant_method.process_weights_after_loading(module)
    return model


def test_an_ffns_activation_is_the_backends_and_mixes_what_the_linears_hold(config, model) -> None:
    mlp: Any = model.model.layers[1].mlp
    x = random(5, mlp.gate_up_proj.input_size, seed=3)
    with torch.inference_mode():
        plain = mlp(x)
    backend = Activating()
    patched = PatchedModel(config, CPU, model, backend, MoeBlocks(), Vocabulary())
    patched.warm_up(8)
    assert backend.activated
    assert isinstance(mlp.act_fn, ReplacedActivation)
    (handle,) = (h for h, shape in backend.shapes.items() if shape.name == "layers.1.mlp")
    shape = backend.shapes[handle]
    pair = experts(x.shape[1], shape.intermediate, [2, 3], 4)
    up = LinearPiece("up", shape.intermediate, pair, TopK(1), router(2, x.shape[1], 5))
    backend.store(0, SlotWeights({shape.gate_up: [up]}, {}))

    def step(runs: list[Run]) -> torch.Tensor:
        patched.begin_step(runs)
        with torch.inference_mode():
            y: torch.Tensor = mlp(x)
        return y

    backend.activated = 0
    assert torch.equal(step([]), plain)
    assert backend.activated == 0
    mixed = step([Run(0, 1, 3)])
    assert backend.activated == 1
    with torch.inference_mode():
        patched.begin_step([])
        gate_up = mlp.gate_up_proj(x)[0]
        patched.begin_step([Run(0, 1, 3)])
        TorchBackend.linear(backend, gate_up, x, shape.gate_up)
        gate, up_rows = gate_up.chunk(2, dim=1)
        patched.begin_step([])
        expected = mlp.down_proj(torch.nn.functional.silu(gate) * up_rows)[0]
    assert_near(mixed, expected, torch.float32)
    assert not torch.allclose(mixed[1:3], plain[1:3], atol=0.1)
    assert torch.equal(mixed[3:], plain[3:])


@pytest.mark.parametrize("kept", ["eager", "torch", "weights of a byte"])
def test_an_activation_stays_where_the_backend_is_another_or_inputs_are_quantised(
    config, model, kept, monkeypatch
) -> None:
    backend = TorchBackend() if kept == "torch" else Activating()
    monkeypatch.setattr(config.model_config, "enforce_eager", kept == "eager")
    if kept == "weights of a byte":
        monkeypatch.setattr(patched_model, "quantises_inputs", lambda module: True)
    PatchedModel(config, CPU, model, backend, MoeBlocks(), Vocabulary())
    for layer in model.model.layers:
        assert isinstance(layer.mlp.act_fn, MixedActivation)
        assert isinstance(layer.mlp.act_fn.activation, SiluAndMul)
