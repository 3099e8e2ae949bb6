"""X-LoRA in the layout of its authors' package: the golden case written so, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import Case

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats.convert import isolation

PEFT = "base_model.internal_xlora_classifier.layers"
# Of PEFT's two layers, between which it has a ReLU and a dropout.
NAMES = {f"{PEFT}.0": "inner.0", f"{PEFT}.3": "last"}
# One output more than there are gate weights.
WIDER = {"last.weight": torch.ones(37, 32), "last.bias": torch.ones(37)}
CONFIG, TENSORS = "xlora_config.json", "xlora_classifier.safetensors"


@pytest.fixture
def written(tmp_path):
    """The golden case in the package's layout, with other fields and tensors; None takes one out.
    folder: below which the experts are."""

    def write(folder="", tensors=None, **config):
        target = tmp_path / "package"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        source = Case("xlora").path
        fields = json.loads((source / "adapter_config.json").read_text())
        same = ("hidden_size", "layerwise_scalings", "softmax_temperature", "xlora_depth")
        fields = {name: fields[name] for name in (*same, "xlora_size", "xlora_dropout_p")} | {
            "adapters": {f"adapter_{i + 1}": f"/somewhere/adapter_{i + 1}/" for i in range(3)},
            "base_model_id": "tiny-llama",
            "enable_relu_and_dropout": True,
            "enable_softmax": True,
            "scaling_pass_value": 0,
            "top_k_lora": None,
            "use_bias": True,
            "use_trainable_adapters": False,
        }
        fields |= config
        fields = {name: value for name, value in fields.items() if value is not None}
        (target / CONFIG).write_text(json.dumps(fields))
        values = load_file(source / "adapter_model.safetensors")
        for theirs, its in NAMES.items():
            for part in ("weight", "bias"):
                values[f"{its}.{part}"] = values.pop(f"{theirs}.{part}")
        values |= tensors or {}
        save_file({n: value for n, value in values.items() if value is not None}, target / TENSORS)
        for i in range(3):
            shutil.copytree(source / str(i), target / folder / f"adapter_{i + 1}")
        return target

    return write


@pytest.mark.parametrize(
    ("folder", "trained"), [("", False), ("adapters", True), ("adapters", False), ("", True)]
)
def test_the_golden_case_is_what_pefts_files_are(written, folder, trained):
    path = written(folder, use_trainable_adapters=trained)
    adapter, golden = formats.read(path), formats.read(Case("xlora").path)
    assert adapter.digest == golden.digest
    assert adapter.base_model == golden.base_model
    assert adapter.warnings == golden.warnings


@pytest.mark.slow
def test_a_pickle_is_read_apart(written):
    path = written("adapters", use_trainable_adapters=True)
    torch.save(load_file(path / TENSORS), path / "xlora_classifier.pt")
    (path / TENSORS).unlink()
    assert isolation.is_pickled(path)
    assert isolation.read_isolated(path).digest == formats.read(Case("xlora").path).digest
    (path / "xlora_classifier.pt").unlink()
    assert not isolation.is_pickled(path)
    torch.save({}, path / "adapters" / "adapter_2" / "adapter_model.bin")
    assert isolation.is_pickled(path)


def test_without_relu_the_classifier_is_a_product_of_its_layers(written):
    more = {"inner.1.weight": torch.randn(32, 32), "inner.1.bias": torch.randn(32)}
    path = written(tensors=more, enable_relu_and_dropout=False, xlora_depth=3)
    values = {name: value.float() for name, value in load_file(path / TENSORS).items()}
    hidden = torch.randn(5, 64)
    x = hidden
    for stem in ("inner.0", "inner.1", "last"):
        x = torch.nn.functional.linear(x, values[f"{stem}.weight"], values[f"{stem}.bias"])
    classifier = formats.read(path).classifier
    assert len(classifier.layers) == 1
    torch.testing.assert_close(
        classifier.scalings(hidden), torch.softmax(x.view(5, -1, 3), -1), rtol=1e-4, atol=1e-5
    )
    with_relu = formats.read(written(tensors=more, xlora_depth=3)).classifier
    assert (with_relu.scalings(hidden) - classifier.scalings(hidden)).abs().max() > 0.01


def test_without_biases(written):
    nothing = {"inner.0.bias": None, "last.bias": None}
    adapter = formats.read(written(tensors=nothing, use_bias=False))
    assert all(not bias.any() for _, bias in adapter.classifier.layers)
    with pytest.raises(MissingTensorError, match=r"inner\.0\.bias"):
        formats.read(written(tensors=nothing))
    with pytest.raises(UnsupportedError, match=r"use_bias is false"):
        formats.read(written(use_bias=False))


def test_what_its_top_k_chose_along_is_said(written):
    adapter = formats.read(written(top_k_lora=2, non_granular_after=4))
    assert (adapter.classifier.top_k, adapter.classifier.non_granular_after) == (2, 4)
    assert any("along the tokens" in text for text in adapter.warnings)
    assert any("non_granular_after is 4" in text for text in adapter.warnings)


@pytest.mark.parametrize(
    ("config", "tensors", "error", "where"),
    [
        ({"adapters": ["adapter_1", "adapter_2", "adapter_3"]}, {}, ConfigError, "adapters"),
        ({"adapters": None}, {}, ConfigError, "adapters"),
        ({"adapters": {"1": "./../adapter_9"}}, {}, ConfigError, "adapters"),
        ({"adapters": {"../adapter_1": "x"}}, {}, UnsupportedError, "adapters"),
        ({"use_mean_pool": True}, {}, UnsupportedError, "use_mean_pool"),
        ({"hidden_size": 32}, {}, ShapeError, "inner.0.weight"),
        ({"xlora_size": 16}, {}, ShapeError, "last.weight"),
        ({"xlora_depth": 1}, {}, ShapeError, "the classifier"),
        ({}, {"last.weight": None, "last.bias": None}, MissingTensorError, "last.weight"),
        ({}, {"more": torch.ones(1)}, UnsupportedError, "more"),
        ({}, {"last.bias": torch.ones(5)}, ShapeError, "last.bias"),
        (
            {"enable_relu_and_dropout": False},
            {"inner.0.bias": torch.ones(5)},
            ShapeError,
            "inner.0",
        ),
        ({}, WIDER, ShapeError, "last.weight"),
        ({"non_granular_after": -1}, {}, ConfigError, "non_granular_after"),
    ],
)
def test_what_contradicts_itself_is_refused(written, config, tensors, error, where):
    with pytest.raises(error) as caught:
        formats.read(written(tensors=tensors, **config))
    assert where in caught.value.where
