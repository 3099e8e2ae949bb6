"""Every way in which an adapter's files can be wrong is a typed error that says where."""

import json
import pickle
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.engine import formats
from molehill.engine.base import Limits
from molehill.engine.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnsupportedError,
)


def refusal(kind, directory, limits=formats.DEFAULT_LIMITS):
    with pytest.raises(kind) as caught:
        formats.read(directory, limits)
    assert type(caught.value) is kind
    return caught.value


# The directory and its files


def test_a_path_that_does_not_exist(tmp_path):
    error = refusal(AdapterNotFoundError, tmp_path / "nowhere")
    assert "nowhere" in error.where


def test_a_file_is_no_adapter_directory(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(AdapterNotFoundError, tmp_path / "file").found == "a file"


def test_no_config(tmp_path):
    error = refusal(ConfigError, tmp_path)
    assert str(error) == "adapter_config.json: found no such file, expected a JSON object"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "malformed JSON"),
        ("{", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("[1]", "list"),
        ("null", "NoneType"),
        (b"\xff\xfe\xfd".decode("latin-1"), "malformed JSON"),
    ],
    ids=["empty", "cut", "deep", "list", "null", "binary"],
)
def test_a_config_that_is_no_object(edited, text, found):
    directory = edited("lora")
    (directory / "adapter_config.json").write_text(text, encoding="latin-1")
    error = refusal(ConfigError, directory)
    assert error.where == "adapter_config.json"
    assert error.found.startswith(found)


def test_no_weights(edited):
    directory = edited("lora")
    (directory / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors" in refusal(MissingTensorError, directory).expected


def test_weights_that_are_a_directory(edited):
    directory = edited("lora")
    (directory / "adapter_model.bin").unlink()
    (directory / "adapter_model.bin").mkdir()
    assert refusal(CorruptFileError, directory).where == "adapter_model.bin"


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_truncated_weights(edited, suffix, keep):
    directory = edited("lora", safetensors=suffix == "safetensors")
    path = directory / f"adapter_model.{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert refusal(CorruptFileError, directory).where == path.name


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        safetensors_bytes(b"{not json"),
        safetensors_bytes({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        safetensors_bytes(
            {"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, b"12345678"
        ),
        safetensors_bytes(
            {"t": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"
        ),
        safetensors_bytes(
            {"t": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"12345678"
        ),
    ],
    ids=["length", "json", "offsets", "shape", "dtype", "overflow"],
)
def test_lying_safetensors_headers(edited, content):
    directory = edited("lora", safetensors=True)
    (directory / "adapter_model.safetensors").write_bytes(content)
    assert refusal(CorruptFileError, directory).where == "adapter_model.safetensors"


class Bomb:
    def __reduce__(self):
        return print, ("a pickle was executed",)


def test_pickled_code_is_not_run(edited, capsys):
    directory = edited("lora")
    torch.save({"a": Bomb()}, directory / "adapter_model.bin")
    assert refusal(CorruptFileError, directory).where == "adapter_model.bin"
    assert capsys.readouterr().out == ""


def test_a_plain_pickle_is_not_read(edited, capsys):
    directory = edited("lora")
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    assert "zip archive" in refusal(CorruptFileError, directory).expected
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"a": [1]}, {1: torch.ones(1)}, torch.ones(1), {"a": {"b": torch.ones(1)}}],
    ids=["list", "value", "key", "tensor", "nested"],
)
def test_a_pickle_of_something_else(edited, content):
    directory = edited("lora")
    torch.save(content, directory / "adapter_model.bin")
    assert refusal(CorruptFileError, directory).where.startswith("adapter_model.bin")


NAME = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(4).to_sparse(), torch.empty(2, 64, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_plain_values(edited, tensor):
    error = refusal(CorruptFileError, edited("lora", tensors={NAME: tensor}))
    assert NAME in error.where


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_floating_point(edited, dtype):
    directory = edited("lora", tensors={NAME: lambda t: t.to(dtype)})
    error = refusal(UnsupportedError, directory)
    assert (error.where, error.found) == (f"adapter_model.bin: {NAME}", str(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("safetensors", [True, False])
def test_values_that_are_not_finite(edited, value, safetensors):
    directory = edited(
        "lora",
        tensors={NAME: lambda t: t.index_fill(1, torch.tensor(3), value)},
        safetensors=safetensors,
    )
    error = refusal(NonFiniteError, directory)
    assert NAME in error.where
    assert error.found == "2 of 128 values NaN or Inf"


def test_values_beyond_float32(edited):
    tensor = torch.full((2, 64), 1e300, dtype=torch.float64)
    assert NAME in refusal(NonFiniteError, edited("lora", tensors={NAME: tensor})).where


def test_values_that_scaling_makes_infinite(edited):
    name = NAME.replace("lora_A", "lora_B")
    directory = edited("lora", {"lora_alpha": 1e30}, {name: lambda t: t.float() * 1e20})
    error = refusal(NonFiniteError, directory)
    assert name in error.where
    assert error.found == "Inf once scaled by 5e+29"


# Limits


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        (Limits(experts=3), "experts 4"),
        (Limits(rank=1), "rank 2"),
        (Limits(total_rank=7), "rank rows 8"),
    ],
)
def test_limits_of_a_site(edited, limits, found):
    error = refusal(LimitError, edited("mola"), limits)
    assert (error.where, error.found) == ("layers.0.mlp.down_proj", found)


def test_a_file_over_the_limit_is_not_read_to_its_end(edited):
    directory = edited("mola")
    size = (directory / "adapter_model.bin").stat().st_size
    error = refusal(LimitError, directory, Limits(adapter_bytes=size - 1))
    assert (error.where, error.found) == ("adapter_model.bin", f"{size} bytes")


def test_a_compressed_archive_counts_unpacked(edited):
    directory = edited("lora", tensors={NAME: torch.zeros(2, 500_000)})
    path = directory / "adapter_model.bin"
    with zipfile.ZipFile(path) as plain:
        records = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in records.items():
            packed.writestr(name, data)
    assert path.stat().st_size < 1_000_000
    error = refusal(LimitError, directory, Limits(adapter_bytes=1_000_000))
    assert "unpacked" in error.found


def test_a_repeated_element_counts_as_often_as_it_is_seen(edited):
    directory = edited("lora", tensors={NAME: torch.ones(1, 1).expand(10**6, 10**6)})
    error = refusal(LimitError, directory)
    assert "bytes in float32" in error.found


# The config


CONFIG_ERRORS = [
    ("lora", "r", 0),
    ("lora", "r", -2),
    ("lora", "r", "8"),
    ("lora", "r", 2.5),
    ("lora", "r", True),
    ("lora", "r", None),
    ("lora", "lora_alpha", 0),
    ("lora", "lora_alpha", "16"),
    ("lora", "lora_alpha", float("nan")),
    ("lora", "lora_alpha", float("inf")),
    ("lora", "lora_alpha", 10**400),
    ("lora", "use_rslora", "yes"),
    ("lora", "target_modules", 3),
    ("lora", "target_modules", [1]),
    ("lora", "rank_pattern", {"q_proj": 0}),
    ("lora", "rank_pattern", [3]),
    ("lora", "alpha_pattern", {"q_proj": -1}),
    ("lora", "alpha_pattern", {"(q_proj": 1}),
    ("lora", "base_model_name_or_path", 3),
    ("lora", "peft_type", 3),
    ("lora", "r", [2, 2, 2, 2]),
    ("mola-official", "r", []),
    ("mola-official", "r", [2, 3, 4]),
    ("mola-official", "r", [2, 3, 4, "2"]),
    ("mola-official", "r", {"0": 2}),
    ("mola-official", "top_k", 0),
    ("mola-official", "top_k", [2, 2, 2]),
    ("mola-official", "top_k", [2, 2, 2, True]),
    ("mola-official", "top_k", "2"),
    ("loramoe-official", "lora_nums", 0),
    ("loramoe-official", "lora_nums", [4]),
    ("hydralora", "lora_alpha", None),
    ("mola", "num_experts", 0),
    ("mola", "top_k", 0),
    ("mola", "top_k", -1),
    ("mola", "top_k", 1.5),
    ("mixlora", "top_k", "2"),
    ("mixlora", "act_fn", 7),
    ("mixlora", "expert_lora", [1]),
    ("mixlora", "expert_lora", {"r": 2}),
    ("mixlora", "routing_strategy", None),
    ("mixlora-dynamic-t0", "top_p", 0),
    ("mixlora-dynamic-t0", "top_p", 1.01),
    ("mixlora-dynamic-t0", "top_p", float("nan")),
    ("mixlora-dynamic-t0", "temperature", -1),
    ("dynmole-k1", "top_p", -0.1),
    ("dynmole-k1", "top_p", "0.75"),
    ("dynmole-k1", "keep_top_k", 0),
    ("dynmole-k1", "entropy_threshold", -0.5),
    ("dynmole-k1", "entropy_threshold", float("nan")),
    ("dynmole-k1", "entropy_index", 0),
    ("dynmole-k1", "entropy_index", 2.5),
    ("dynmole-k1", "entropy_type", "shannon"),
    ("dynmole-k1", "entropy_eps", -1e-5),
    ("dynmole-k1", "normalize_weights", 1),
]


@pytest.mark.parametrize(("case", "field", "value"), CONFIG_ERRORS)
def test_config_fields_of_the_wrong_type_or_range(edited, case, field, value):
    error = refusal(ConfigError, edited(case, {field: value}))
    assert error.where.startswith("adapter_config.json: ")
    assert field in error.where or "pattern" in error.where
    assert error.found
    assert error.expected


UNSUPPORTED = [
    ("lora", "peft_type", "IA3", "LORA, MIXLORA, MOLA, LORAMOE, DYNMOLE"),
    ("lora", "peft_type", "lora", "LORA"),
    ("lora", "modules_to_save", ["lm_head"], "absent"),
    ("lora", "fan_in_fan_out", True, "absent"),
    ("lora", "layer_replication", [[0, 4], [2, 4]], "absent"),
    ("lora", "trainable_token_indices", [1, 2], "absent"),
    ("lora", "lora_bias", True, "absent"),
    ("lora", "target_parameters", ["mlp.experts"], "gate_up_proj or down_proj"),
    ("lora", "alora_invocation_tokens", [1], "absent"),
    ("lora", "init_lora_weights", "pissa", "leaves them alone"),
    ("lora", "lora_nums", 3, "absent"),
    ("lora", "sparsegen", True, "absent"),
    ("hydralora", "sparsegen", True, "absent"),
    ("hydralora", "fan_in_fan_out", True, "absent"),
    ("loramoe-official", "modules_to_save", ["lm_head"], "absent"),
    ("loramoe-official", "enable_lora", [True, False], "absent"),
    ("mola-official", "use_dora", True, "absent"),
    ("mola-official", "use_rslora", True, "absent"),
    ("mola-official", "rank_pattern", {"q_proj": 2}, "absent"),
    ("lora", "alpha_pattern", {"(a+)+": 1}, "repetition"),
    ("dynmole-k1", "routing_strategy", "mola", "dynmole"),
    ("mixlora", "routing_strategy", "mixlora-best", "mixlora, mixlora-dynamic, mixlora-switch"),
    ("mixlora", "act_fn", "quick_gelu", "silu"),
]


@pytest.mark.parametrize(("case", "field", "value", "expected"), UNSUPPORTED)
def test_what_would_be_served_wrong_is_refused(edited, case, field, value, expected):
    error = refusal(UnsupportedError, edited(case, {field: value}))
    assert expected in error.expected
    assert field in error.where or "pattern" in error.where or "activation" in error.where


def test_an_unknown_strategy_without_a_type(edited):
    error = refusal(UnsupportedError, edited("mola", {"peft_type": None, "routing_strategy": "x"}))
    assert (error.found, "dynmole" in error.expected) == ("x", True)


@pytest.mark.parametrize(("case", "found"), [("xlora", "XLORA"), ("mov", "MOV")])
def test_formats_that_are_not_read_yet_are_named(golden, case, found):
    assert found in refusal(UnsupportedError, golden / "cases" / case).found


def test_meteoras_gates_are_not_understood(edited):
    name = "base_model.model.model.layers.0.mlp.up_proj.moe_gate.weight"
    assert (
        name in refusal(UnsupportedError, edited("lora", tensors={name: torch.ones(2, 64)})).where
    )


# The tensors


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("lora", "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias"),
        ("lora", "base_model.model.model.layers.0.mlp.up_proj.base_layer.bias"),
        ("lora", "base_model.model.model.embed_tokens.lora_embedding_A"),
        ("lora", "base_model.model.lm_head.lora_A.weight"),
        ("lora", "model.layers.0.mlp.up_proj.lora_A.weight"),
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


def without(golden, case, fragment):
    tensors = torch.load(golden / "cases" / case / "adapter_model.bin", weights_only=True)
    names = {name: None for name in tensors if fragment in name}
    assert names
    return names


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


@pytest.mark.parametrize(
    ("case", "name", "shape", "found", "expected"),
    [
        ("lora", NAME, (2, 63), "[2, 63]", None),
        ("lora", NAME, (3, 64), "[176, 2]", "[176, 3]"),
        ("lora", NAME, (2, 64, 1), "[2, 64, 1]", "2 dimensions, none of them empty"),
        ("lora", NAME, (0, 64), "[0, 64]", "2 dimensions, none of them empty"),
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
def test_wrong_shapes(edited, case, name, shape, found, expected):
    directory = edited(case, tensors={name: torch.ones(shape)})
    if expected is None:  # Only the base model can tell.
        assert formats.read(directory).sites["layers.2.mlp.up_proj"].experts.a.shape == shape
        return
    error = refusal(ShapeError, directory)
    assert name.removesuffix("lora_A.weight") in error.where
    assert (error.found, error.expected) == (found, expected)


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


# Damage


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


@settings(deadline=None, max_examples=400)
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
