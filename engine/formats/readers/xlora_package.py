"""X-LoRA (arXiv 2402.07148) as its authors' own package writes it (github.com/EricLBuehler/xlora).

xlora_config.json has the fields of PEFT's config under the same names, and a few of its own;
xlora_classifier.safetensors or .pt the classifier, `inner.{n}` and `last`. The experts are LoRAs
of PEFT's, below by their names in the config's `adapters`, in `adapters/` where they were trained
with the classifier, or by the last part of their paths there.

Where it is not PEFT's: a ReLU lies between two layers with `enable_relu_and_dropout` alone, and
without it, the default, the classifier is a product of matrices, which is made here; `use_bias`
false leaves biases out; `top_k_lora` chose along the tokens of the batch (`torch.topk(..., dim=1)`
in src/xlora/xlora_insertion.py), which no answer may hang on, and is read as PEFT has it; versions
before scalings by token made one set for a whole sequence, of which `use_mean_pool` is a sign.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import torch

from molehill.engine.adapter.errors import MissingTensorError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known
from molehill.engine.formats.readers.reader import AdapterFiles, FileNames, Reader
from molehill.engine.formats.readers.xlora import (
    Layers,
    assembled,
    expert_directories,
    general_warnings,
    named_places,
)

CONFIG = "xlora_config.json"
FILES = FileNames(CONFIG, ("xlora_classifier.safetensors", "xlora_classifier.pt"))
# Below which experts lie that were trained with the classifier.
TRAINED = "adapters"

_KEY = re.compile(r"(?P<stem>inner\.(?P<n>\d{1,3})|last)\.(?:weight|bias)")
_TOP_K = (
    "top_k_lora: the greatest experts of each token, as PEFT has it; the authors' package chose "
    "along the tokens of a batch"
)
_ORDER = (
    "an object of names and paths in the classifier's order, which the authors' package wants from "
    "whoever loads the adapter and older versions of it do not save"
)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError that names the file, or the expert's directory, and the field or
    tensor."""
    config = files.config
    config.refuse({"use_mean_pool": "one set of scalings for a whole sequence, which grows"})
    if not isinstance(config.values.get("adapters"), dict):
        raise config.error("adapters", _ORDER)
    trained = config.flag("use_trainable_adapters")
    directories = expert_directories(files, lambda name, path: candidates(name, path, trained))
    return assembled(
        files,
        directories,
        _layers(files.weights, config.flag("use_bias", True)),
        _warnings(config),
        config.text("base_model_id"),
        has_relu=config.flag("enable_relu_and_dropout"),
    )


def _places(config: Fields) -> dict[str, list[str]]:
    trained = config.flag("use_trainable_adapters")
    return named_places(config, lambda name, path: candidates(name, path, trained))


READER = Reader(FILES, read, no_layout="an X-LoRA has no LoRA on fused experts", members=_places)


def candidates(name: str, path: str, trained: bool) -> list[str]:
    """Where an expert may lie below, the best first."""
    names = list(dict.fromkeys((name, PurePosixPath(path).name)))
    below = [f"{TRAINED}/{each}" for each in names]
    return [*below, *names] if trained else [*names, *below]


def _layers(weights: Weights, has_bias: bool) -> Layers:
    """Raises MissingTensorError, UnsupportedError."""
    stems: dict[float, str] = {}
    for name in weights.tensors:
        match = _KEY.fullmatch(name)
        if match is None or (name.endswith(".bias") and not has_bias):
            expected = "inner.{n} or last, .weight" + (
                " or .bias" if has_bias else ", as use_bias is false"
            )
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
        stems[float("inf") if match["n"] is None else int(match["n"])] = match["stem"]
    if "last" not in stems.values():
        where = f"{weights.file}: last.weight"
        raise MissingTensorError(
            where, "no such tensor", "the last layer of an X-LoRA's classifier"
        )
    layers = {}
    for _, stem in sorted(stems.items()):
        weight = weights.tensor(f"{stem}.weight", 2)
        bias = weights.tensor(f"{stem}.bias", 1) if has_bias else torch.zeros(len(weight))
        layers[stem] = weight, bias
    return layers


def _warnings(config: Fields) -> Sequence[str]:
    return (
        *general_warnings(config),
        *([_TOP_K] if config.has("top_k_lora") else []),
        *known.warnings(config, known.FIELDS["xlora_package"]),
    )
