"""MoLE and AdaMoLE (arXiv 2405.00361) as the AdaMoLE code writes them.

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.` with

    lora_gating.weight                [E, in]
    lora_threshold.weight, .bias      [1, in], [1]        AdaMoLE only
    lora_A.{e}.weight, lora_B.{e}.weight
    moe_layer.experts.{e}.lora_A.weight, .lora_B.weight   the same tensors by another name
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from molehill.engine.adapter.errors import CorruptFileError, MissingTensorError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, linears, peft, saved_modules
from molehill.engine.formats.readers.linears import EXPERT, STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts, read_router
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import AdaMoLE, Policy, Threshold, TopK

_COPY = re.compile(rf"{STEM}\.moe_layer\.experts\.(?P<e>{EXPERT})\.lora_(?P<half>[AB])\.weight")
_KEY = re.compile(
    rf"{STEM}\.(?:lora_gating\.weight|lora_threshold\.(?:weight|bias)|lora_[AB]\.{EXPERT}\.weight)"
)
_UNSERVED = {"use_rslora": "rsLoRA's scaling"}
_THRESHOLD = ("lora_threshold.weight", "lora_threshold.bias")


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config = files.config
    config.refuse(_UNSERVED)
    beside = peft.check_initialisation(config)
    kind = str(config.values["peft_type"]).lower()
    extra = _THRESHOLD if kind == "adamole" else ()
    layout = PartNames(kind, "lora_gating.weight", "lora_A.{e}.weight", "lora_B.{e}.weight", extra)
    policy = _policy(config, kind)
    scaling = Scaling(config.number("lora_alpha", above=0), config.integer("lora_rank"))
    weights = without_copies(files.weights)
    notes = saved_modules.check(config, weights)
    expected = "lora_gating, lora_threshold, lora_A or lora_B of a layer's linear"
    stems = linears.find_stems(weights, _KEY, expected)
    warnings = linears.check_targets(config, weights, stems, files.base)
    sites = {
        module: _mixture(config, weights, layout, stem, scaling, policy)
        for module, stem in stems.items()
    }
    experts = {stems[module]: mixture.num_experts for module, mixture in sites.items()}
    linears.check_all_used(weights, layout, experts)
    notes += beside + known.warnings(config, known.FIELDS[kind])
    return Adapter(kind, sites, config.text("base_model_name_or_path"), warnings + notes)


READER = Reader(PEFT_FILES, read, peft_types=("MOLE", "ADAMOLE"))


def _policy(config: Fields, kind: str) -> Callable[[int], Policy]:
    """By the number of experts."""
    if kind == "adamole":
        if not config.has("max_threshold"):
            return lambda experts: AdaMoLE(1 / experts)
        greatest = config.number("max_threshold", at_least=0)
        return lambda experts: AdaMoLE(greatest)
    if config.has("top_k") == config.has("threshold"):
        raise config.error("threshold", "a number, or a top_k instead")
    if config.has("top_k"):
        k = config.integer("top_k")
        return lambda experts: TopK(k)
    threshold = config.number("threshold", at_least=0)
    return lambda experts: Threshold(threshold)


def without_copies(weights: Weights) -> Weights:
    """The tensors less the second name of each. Raises CorruptFileError if two are not the same."""
    tensors = dict(weights.tensors)
    for name in weights.tensors:
        match = _COPY.fullmatch(name)
        if match is None:
            continue
        first = f"{match['stem']}.lora_{match['half']}.{match['e']}.weight"
        if first not in weights.tensors:
            raise MissingTensorError(weights.where(first), "no such tensor", f"that of {name}")
        if not torch.equal(weights.tensors[first], tensors.pop(name)):
            raise CorruptFileError(weights.where(name), "other values", f"those of {first}")
    return Weights(weights.file, tensors)


def _mixture(
    config: Fields,
    weights: Weights,
    layout: PartNames,
    stem: str,
    scaling: Scaling,
    policy: Callable[[int], Policy],
) -> LinearMixture:
    name = f"{stem}.{layout.router}"
    count = linears.count_experts(config, "num_experts", weights, name)
    experts = build_experts(weights, layout.pairs(stem, count), scaling)
    inputs = experts.a.shape[1]
    router = read_router(weights, name, inputs)
    if not layout.extra:
        return LinearMixture(experts, policy(count), router)
    row, bias = (f"{stem}.{part}" for part in layout.extra)
    threshold = _shaped(weights, row, [1, inputs])
    return LinearMixture(
        experts,
        policy(count),
        torch.cat([router, threshold]),
        parameters=_shaped(weights, bias, [1]),
    )


def _shaped(weights: Weights, name: str, shape: list[int]) -> Tensor:
    tensor = weights.tensor(name, len(shape))
    if list(tensor.shape) != shape:
        raise ShapeError(weights.where(name), list(tensor.shape), shape)
    return tensor
