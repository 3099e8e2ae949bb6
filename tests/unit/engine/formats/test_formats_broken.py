"""Tensors that are wrong, missing or damaged are typed errors that say where."""

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.broken import NAME, refusal, without
from support.examples import examples

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    AdapterError,
    CorruptFileError,
    MissingTensorError,
    NothingBoundError,
    ShapeError,
    UnsupportedError,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("lora", "base_model.model.model.layers.0.mlp.up_proj.lora_A.bias"),
        ("lora", "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias"),
        ("lora", "base_model.model.model.layers.0.mlp.up_proj.base_layer.bias"),
        ("lora", "base_model.model.model.embed_tokens.lora_embedding_A"),
        ("lora", "base_model.model.lm_head.lora_A.weight"),
        ("lora", "model.layer.0.mlp.up_proj.lora_A.weight"),
        ("lora", "base_model.model.model.layers.01.mlp.up_proj.lora_A.weight"),
        ("dynmole-k1", "dynmole.layers.0.mlp.up_proj.experts.0.lora_A.bias"),
        ("dynmole-k1", "mola.layers.0.mlp.up_proj.moe_gate.weight"),
        ("dynmole-k1", "dynmole.layers.0.mlp.up_proj.experts.00.lora_A.weight"),
        ("dynmole-k1", "dynmole.layers.0.mlp.up_proj.experts.0.lora_magnitude_vector"),
        ("dynmole-k1", "classifier"),
        ("mixlora", "mixlora.layers.0.mlp.gate_proj.moe_gate.weight"),
        ("mixlora", "mixlora.layers.0.mlp.moe_gate.bias"),
        ("mola-official", "base_model.model.model.layers.0.mlp.down_proj.lora_A_2.weight"),
        ("mola-official", "base_model.model.model.layers.0.mlp.down_proj.lora_A_00.weight"),
        ("mola-official", "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
        ("mola-official", "base_model.model.model.layers.0.mlp.down_proj.router.router.bias"),
        ("loramoe-official", "base_model.model.model.layers.0.mlp.up_proj.lora_B4.weight"),
        ("loramoe-official", "base_model.model.model.layers.0.mlp.up_proj.lora_route.bias"),
        ("loramoe-official", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
        ("hydralora", "base_model.model.model.layers.0.mlp.down_proj.lora_A0.weight"),
        ("hydralora", "base_model.model.lm_head.lora_A.weight"),
    ],
)
def test_a_tensor_that_is_not_understood(edited, case, name):
    error = refusal(UnsupportedError, edited(case, tensors={name: torch.ones(2, 64)}))
    assert error.where == f"adapter_model.bin: {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("lora", "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"),
        ("lora", "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"),
        ("dora", "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"),
        ("mola", "mola.layers.1.self_attn.q_proj.experts.2.lora_A.weight"),
        ("mola", "mola.layers.1.self_attn.q_proj.moe_gate.weight"),
        ("mixlora", "mixlora.layers.3.mlp.moe_gate.weight"),
        ("mixlora", "mixlora.layers.3.mlp.up_proj.experts.1.lora_B.weight"),
        ("loramoe", "loramoe.layers.0.self_attn.q_proj.lora_B.weight"),
        ("mola-official", "base_model.model.model.layers.2.mlp.down_proj.lora_A_3.weight"),
        ("mola-official", "base_model.model.model.layers.2.mlp.down_proj.router.router.weight"),
        ("loramoe-official", "base_model.model.model.layers.2.mlp.up_proj.lora_B3.weight"),
        ("loramoe-official", "base_model.model.model.layers.2.mlp.up_proj.lora_route.weight"),
        ("hydralora", "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"),
        ("hydralora", "base_model.model.model.layers.2.mlp.down_proj.lora_B0.weight"),
    ],
)
def test_a_missing_tensor_is_named(edited, case, name):
    error = refusal(MissingTensorError, edited(case, tensors={name: None}))
    assert error.where.endswith(f": {name}")
    assert error.found == "no such tensor"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "fragment", "where"),
    [
        ("dynmole-k1", "2.mlp.up_proj.experts.1.", "layers.2.mlp.up_proj.experts.1"),
        ("dynmole-k1", "2.mlp.up_proj.experts.3.", "layers.2.mlp.up_proj.experts.3"),
        ("dynmole-k1", "layers.2.mlp.up_proj.", "layers.2.mlp.up_proj"),
        ("dynmole-k1", "layers.1.", "layers.1"),
        ("mixlora", "layers.0.", "layers.0"),
        ("mixlora", "layers.2.mlp.down_proj.", "layers.2.mlp.down_proj"),
        ("mixlora-switch", "layers.3.self_attn.v_proj.", "layers.3.self_attn.v_proj"),
        ("loramoe", "layers.2.self_attn.q_proj.", "layers.2.self_attn.q_proj"),
        ("lora", "layers.2.self_attn.q_proj.", "layers.2.self_attn.q_proj"),
        ("lora", "layers.0.mlp.down_proj.", "layers.0.mlp.down_proj"),
        ("mola-official", "layers.2.", "layers.2"),
        ("hydralora", "layers.3.mlp.down_proj.", "layers.3.mlp.down_proj"),
    ],
)
def test_missing_experts_projections_and_layers_are_named(golden, edited, case, fragment, where):
    directory = edited(case, tensors=without(golden, case, fragment))
    error = refusal(MissingTensorError, directory)
    assert where in error.where
    assert error.found == "no tensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name", "shape", "message", "expected"),
    [
        ("lora", NAME, (2, 63), "[2, 63]", None),
        ("lora", NAME, (3, 64), "[176, 2]", "[176, 3]"),
        ("lora", NAME, (2, 64, 1), "[2, 64, 1]", "2 dimensions, none of them empty"),
        ("lora", NAME.replace("lora_A", "lora_B"), (176, 3), "[176, 3]", "[176, 2]"),
        ("mola", "mola.layers.0.self_attn.q_proj.moe_gate.weight", (4, 63), "[4, 63]", "[4, 64]"),
        (
            "mola",
            "mola.layers.0.self_attn.q_proj.moe_gate.weight",
            (5, 64),
            "5 experts",
            "num_experts 4",
        ),
        (
            "mola",
            "mola.layers.0.self_attn.q_proj.experts.1.lora_A.weight",
            (2, 65),
            "[2, 65]",
            "[2, 64]",
        ),
        (
            "mola",
            "mola.layers.0.self_attn.q_proj.experts.1.lora_B.weight",
            (99, 2),
            "[99, 2]",
            "[128, 2]",
        ),
        ("mixlora", "mixlora.layers.0.mlp.moe_gate.weight", (4, 65), "[4, 65]", "[4, 64]"),
        (
            "mola-official",
            "base_model.model.model.layers.1.mlp.down_proj.lora_B_2.weight",
            (65, 3),
            "[65, 3]",
            "[64, 3]",
        ),
        (
            "loramoe-official",
            "base_model.model.model.layers.1.mlp.down_proj.lora_route.weight",
            (4, 175),
            "[4, 175]",
            "[4, 176]",
        ),
        (
            "hydralora",
            "base_model.model.model.layers.1.mlp.down_proj.lora_B1.weight",
            (64, 5),
            "[64, 5]",
            "[64, 4]",
        ),
        (
            "dora",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            (127,),
            "[127]",
            "[128]",
        ),
    ],
)
def test_wrong_shapes(edited, case, name, shape, message, expected):
    directory = edited(case, tensors={name: torch.ones(shape)})
    if expected is None:  # Only the base model can tell.
        assert formats.read(directory).sites["layers.2.mlp.up_proj"].experts.a.shape == shape
        return
    error = refusal(ShapeError, directory)
    assert name.removesuffix("lora_A.weight") in error.where
    assert (error.found, error.expected) == (message, expected)


def test_a_rank_that_is_not_the_configs_leaves_the_scaling_in_doubt(edited):
    error = refusal(ShapeError, edited("lora", {"r": 8}))
    assert (error.found, error.expected) == ("rank 2", "the config's rank 8")


def test_more_experts_than_gate_rows(edited):
    name = "mola.layers.0.self_attn.q_proj.moe_gate.weight"
    error = refusal(ShapeError, edited("mola", {"num_experts": None}, {name: lambda t: t[:3]}))
    assert error.where.endswith("q_proj.experts.3")
    assert error.expected == "the gate's 3 experts"


def test_num_experts_that_is_not_the_gates(edited):
    error = refusal(ShapeError, edited("dynmole-k1", {"num_experts": 8}))
    assert (error.found, error.expected) == ("4 experts", "num_experts 8")


def test_lora_nums_that_is_not_the_routers(edited):
    error = refusal(ShapeError, edited("hydralora", {"lora_nums": 4}))
    assert (error.found, error.expected) == ("3 experts", "lora_nums 4")


def test_a_rank_that_is_not_its_layers(edited):
    error = refusal(ShapeError, edited("mola-official", {"r": [2, 3, 4, 4]}))
    assert "layers.3." in error.where
    assert (error.found, error.expected) == ("rank 2", "the config's rank 4")


def test_an_untargeted_module(edited):
    error = refusal(UnsupportedError, edited("dynmole-k1", {"target_modules": ["v_proj"]}))
    assert "up_proj" in error.where
    assert error.expected == "one of target_modules v_proj"


def test_magnitudes_without_use_dora(edited):
    assert "magnitude" in refusal(UnsupportedError, edited("dora", {"use_dora": False})).where


def test_a_module_that_lacks_the_magnitude_that_others_have(edited):
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_magnitude_vector"
    assert name in refusal(MissingTensorError, edited("dora", tensors={name: None})).where


def test_two_spellings_of_one_module(golden, edited):
    tensors = torch.load(golden / "cases" / "lora" / "adapter_model.bin", weights_only=True)
    double = {NAME.replace("model.model.layers", "model.layers"): tensors[NAME]}
    assert "two spellings" in refusal(CorruptFileError, edited("lora", tensors=double)).found


def test_experts_of_an_ungated_ffn(golden, edited):
    tensors = torch.load(golden / "cases" / "mixlora" / "adapter_model.bin", weights_only=True)
    renamed = {n: None for n in tensors if "up_proj" in n}
    renamed |= {n.replace("up_proj", "fc1"): tensors[n] for n in tensors if "up_proj" in n}
    directory = edited("mixlora", {"target_modules": ["gate_proj", "down_proj", "fc1"]}, renamed)
    error = refusal(UnsupportedError, directory)
    assert error.where.endswith("mlp.fc1")
    assert "gate_proj, up_proj, down_proj" in error.expected


def test_an_adapter_of_zeros_is_the_base_in_disguise(golden, edited):
    for case in ("lora", "dynmole-k1"):
        tensors = torch.load(golden / "cases" / case / "adapter_model.bin", weights_only=True)
        zeros = {name: torch.zeros_like(t) for name, t in tensors.items() if "lora_B" in name}
        directory = edited(case, tensors=zeros)
        assert refusal(NothingBoundError, directory).where == "adapter"
        shutil.rmtree(directory)


def test_mixlora_of_zeros_acts_only_if_its_weights_do_not_sum_to_1(golden, edited):
    tensors = torch.load(golden / "cases" / "mixlora" / "adapter_model.bin", weights_only=True)
    zeros = {name: torch.zeros_like(t) for name, t in tensors.items() if "lora_B" in name}
    directory = edited("mixlora", tensors=zeros)
    refusal(NothingBoundError, directory)
    shutil.rmtree(directory)
    directory = edited("mixlora", {"routing_strategy": "mixlora-switch"}, zeros)
    assert len(formats.read(directory).sites) == 4


def test_gates_alone_bind_nothing(golden, edited):
    directory = edited("mixlora", {"target_modules": []}, without(golden, "mixlora", ".experts."))
    assert refusal(NothingBoundError, directory).found == "0 sites, no effect"


DAMAGE = st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=4))


# A case with each file, PEFT's and MoE-PEFT's and the forks'.
DAMAGED = [
    ("dora", "adapter_config.json"),
    ("dora", "adapter_model.safetensors"),
    ("dynmole-k1", "adapter_config.json"),
    ("dynmole-k1", "adapter_model.bin"),
    ("mola-official", "adapter_config.json"),
    ("hydralora", "adapter_config.json"),
    ("hydralora", "adapter_model.bin"),
]


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(200))
@given(source=st.sampled_from(DAMAGED), damage=st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_bytes_give_an_adapter_or_a_typed_error(golden, source, damage):
    case, file = source
    with TemporaryDirectory() as name:
        directory = Path(name)
        for original in (golden / "cases" / case).glob("adapter_*"):
            shutil.copy(original, directory)
        data = bytearray((directory / file).read_bytes())
        for place, length, replacement in damage:
            at = place % max(len(data), 1)
            data[at : at + length] = replacement
        (directory / file).write_bytes(data)
        with suppress(AdapterError):
            assert formats.read(directory).sites
