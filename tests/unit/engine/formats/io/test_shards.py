"""Adapters in several files, in float8, without their other processes' parts, one directory up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.golden import Case

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)

WHOLE, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """A golden adapter over three files; its directory and its weight map."""
    shutil.copytree(Case("dora").path, tmp_path / "a")
    (tmp_path / "a" / WHOLE).unlink()
    tensors = load_file(Case("dora").path / WHOLE)
    parts = {f"adapter_model-0000{i + 1}-of-00003.safetensors": i for i in range(3)}
    weight_map = {}
    for file, i in parts.items():
        part = dict(list(tensors.items())[i::3])
        save_file(part, tmp_path / "a" / file)
        weight_map |= dict.fromkeys(part, file)
    write(tmp_path / "a", weight_map)
    return tmp_path / "a", weight_map


def write(directory, weight_map):
    document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(document))


def test_shards_are_the_adapter_that_one_file_is(sharded):
    directory, _ = sharded
    assert formats.read(directory).digest == formats.read(Case("dora").path).digest


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "a.bin", "", ".safetensors"]
)
def test_files_elsewhere_are_refused(sharded, file):
    directory, weight_map = sharded
    write(directory, {**weight_map, "x": file})
    assert refusal(UnsupportedError, directory).where == f"{INDEX}: weight_map: x"


def test_what_the_index_and_the_files_disagree_about(sharded):
    directory, weight_map = sharded
    name, *others = weight_map
    write(directory, {other: weight_map[other] for other in others})
    assert name in refusal(CorruptFileError, directory).where
    write(directory, {**weight_map, "x": weight_map[name]})
    assert refusal(MissingTensorError, directory).where == f"{weight_map[name]}: x"
    write(directory, weight_map)
    (directory / weight_map[name]).unlink()
    assert refusal(MissingTensorError, directory).where == weight_map[name]


@pytest.mark.parametrize("weight_map", [None, {}, [], 3, {"x": 3}])
def test_an_index_that_is_none(sharded, weight_map):
    write(sharded[0], weight_map)
    refusal(ConfigError, sharded[0])


def test_shards_are_limited_together(sharded):
    """Each is below the limit."""
    directory, weight_map = sharded
    sizes = {(directory / file).stat().st_size for file in weight_map.values()}
    refusal(LimitError, directory, Limits(adapter_bytes=2 * max(sizes)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_what_its_values_are(tmp_path, dtype):
    shutil.copytree(Case("dora").path, tmp_path / "a")
    tensors = {name: t.to(dtype) for name, t in load_file(Case("dora").path / WHOLE).items()}
    save_file(tensors, tmp_path / "a" / WHOLE)
    result = formats.read(tmp_path / "a")
    save_file({name: t.float() for name, t in tensors.items()}, tmp_path / "a" / WHOLE)
    assert result.digest == formats.read(tmp_path / "a").digest


@pytest.mark.parametrize("shape", [(0,), (64,), (0, 64), (2, 0)])
def test_ungathered_shards_of_a_trainer_are_named(edited, shape):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    error = refusal(ShapeError, edited("lora", tensors={name: torch.zeros(shape)}))
    assert name in error.where
    assert error.found == str(list(shape))
    for word in ("ZeRO-3", "FSDP", "stage3_gather_16bit_weights_on_model_save", "FULL_STATE_DICT"):
        assert word in error.expected


def test_a_directory_above_checkpoints_names_them(tmp_path):
    for step in (1000, 900, 20):
        shutil.copytree(Case("lora").path, tmp_path / f"checkpoint-{step}")
    (tmp_path / "README.md").write_text("unsloth")
    error = refusal(ConfigError, tmp_path)
    assert error.found == "no such file"
    assert "checkpoint-20, checkpoint-900, checkpoint-1000. Name the one" in error.expected
    for step in (1000, 20):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert "checkpoint-900 below it has one" in refusal(ConfigError, tmp_path).expected
    shutil.copy(Case("lora").path / "adapter_config.json", tmp_path)
    assert "checkpoint-900 below it has one" in refusal(MissingTensorError, tmp_path).expected
    shutil.copy(Case("lora").path / "adapter_model.bin", tmp_path)
    assert formats.read(tmp_path).digest == formats.read(Case("lora").path).digest


def test_a_whole_model_is_named(golden):
    assert "whole model" in refusal(ConfigError, golden / "tiny-llama").expected
