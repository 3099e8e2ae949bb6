"""MixLoRA on Phi-3's gate_up_proj: one pair for gate and up, as MoE-PEFT saves it."""

import pytest
import torch
from support.broken import refusal

from molehill.engine import formats
from molehill.engine.adapter.errors import ShapeError, UnsupportedError

PREFIX = "mixlora.layers.1.mlp"


@pytest.fixture
def fused(golden, edited):
    """The golden MixLoRA with gate's A, and B of gate and up one above the other."""
    tensors = torch.load(golden / "cases" / "mixlora" / "adapter_model.bin", weights_only=True)

    def save(**changes):
        renamed = {}
        for name, tensor in tensors.items():
            if ".gate_proj." in name:
                both = name.replace(".gate_proj.", ".gate_up_proj.")
                up = tensors[name.replace(".gate_proj.", ".up_proj.")]
                renamed[both] = torch.cat([tensor, up]) if "lora_B" in name else tensor
            if ".gate_proj." in name or ".up_proj." in name:
                renamed[name] = None
        config = {"target_modules": ["gate_up_proj", "up_proj", "down_proj"]}
        return tensors, edited("mixlora", config, {**renamed, **changes})

    return save


def test_halves_are_gate_and_up(fused):
    tensors, directory = fused()
    ffn = formats.read(directory).sites["layers.1.mlp"]
    assert set(ffn.experts) == {"gate_proj", "up_proj", "down_proj"}
    gate, up = ffn.experts["gate_proj"], ffn.experts["up_proj"]
    assert torch.equal(gate.a, up.a)
    for e, ((_, b_gate), (_, b_up)) in enumerate(zip(gate.split(), up.split(), strict=True)):
        for projection, b in (("gate_proj", b_gate), ("up_proj", b_up)):
            saved = tensors[f"{PREFIX}.{projection}.experts.{e}.lora_B.weight"]
            assert torch.equal(b, 2 * saved.float())


def test_a_half_beside_the_whole_is_refused(fused):
    expected = {
        f"mixlora.layers.{i}.mlp.up_proj.experts.{e}.lora_{half}.weight": torch.ones(shape)
        for i in range(4)
        for e in range(4)
        for half, shape in (("A", (2, 64)), ("B", (176, 2)))
    }
    error = refusal(UnsupportedError, fused(**expected)[1])
    assert error.found == "gate_up_proj beside up_proj"


def test_an_odd_number_of_outputs_is_refused(fused):
    expected = {
        f"mixlora.layers.{i}.mlp.gate_up_proj.experts.{e}.lora_B.weight": torch.ones(351, 2)
        for i in range(4)
        for e in range(4)
    }
    error = refusal(ShapeError, fused(**expected)[1])
    assert (error.found, error.expected) == ("351 outputs", "as many gates as ups")
