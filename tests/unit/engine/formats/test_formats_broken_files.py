"""Directories and files that hold no adapter, or too much, are typed errors that say where."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from support.broken import NAME, refusal

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    AdapterNotFoundError,
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    UnsupportedError,
)


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
    ("text", "message"),
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
def test_a_config_that_is_no_object(edited, text, message):
    directory = edited("lora")
    (directory / "adapter_config.json").write_text(text, encoding="latin-1")
    error = refusal(ConfigError, directory)
    assert error.where == "adapter_config.json"
    assert error.found.startswith(message)


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


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(experts=3), "experts 4"),
        (Limits(rank=1), "rank 2"),
        (Limits(total_rank=7), "rank rows 8"),
    ],
)
def test_limits_of_a_site(edited, limits, message):
    error = refusal(LimitError, edited("mola"), limits)
    assert (error.where, error.found) == ("layers.0.mlp.down_proj", message)


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
