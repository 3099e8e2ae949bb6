"""X-LoRA (arXiv 2402.07148) as PEFT writes it.

adapter_model.safetensors holds the classifier alone, `base_model.internal_xlora_classifier.layers.
{n}.weight` and `.bias`; n skips ReLUs and dropout. The experts are LoRAs in directories of their
own, which PEFT does not save again: they must lie below, by their names in the config's `adapters`
(whose paths it disregards too) or by the last part of their paths there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from molehill.engine.adapter.errors import (
    LimitError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.adapter.module_names import split_layer
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, members, non_granular
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.transform.merge import is_plain
from molehill.engine.transform.weighted_sum import check_alike, stack_up
from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import ClassifierMixture, Experts, LinearMixture

_KEY = re.compile(
    r"(?:base_model\.)?(?:model\.)*internal_xlora_classifier\.layers\.(?P<n>\d{1,3})\."
    r"(?P<part>weight|bias)"
)
# PEFT gives linears their scalings by their number among the modules of Transformers' model. These
# names come in this order in every decoder layer that has them.
_IN_ORDER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_WARNING = (
    "X-LoRA is served by servers that were started with --xlora; steps with its requests run the "
    "base model twice"
)
_NORMALISED = (
    "enable_softmax_topk: normalised for each token by itself, as PEFT does since its pull request "
    "2793 (October 2025); versions before it normalised over all tokens"
)

_LOST = (
    " (PEFT 0.21.2 leaves out layers.0 where an expert is called 0, and writes the whole model "
    "over the experts: save the parameters of internal_xlora_classifier by their names)"
)

# How far below an expert's directory may be.
LEVELS = 2

Pairs = Mapping[str, Experts]
# Weight and bias by what precedes their names, in order.
Layers = Mapping[str, tuple[Tensor, Tensor]]
# By an expert's name and its path in the config, where it may lie below, the best first.
Candidates = Callable[[str, str], Sequence[str]]


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError that names the file, or the expert's directory, and the field or
    tensor."""
    config = files.config
    directories = expert_directories(files, _candidates)
    layers = _layers(files.weights)
    base_model = config.text("base_model_name_or_path")
    return assembled(files, directories, layers, _warnings(config), base_model, lost=_LOST)


def assembled(
    files: AdapterFiles,
    directories: Mapping[str, str],
    layers: Layers,
    warnings: Sequence[str],
    base_model: str | None,
    has_relu: bool = True,
    lost: str = "",
) -> Adapter:
    """The X-LoRA of experts in directories, by name in the classifier's order, and of the
    classifier's layers.

    has_relu: whether there is one between two layers. lost: what to say where layers are missing.
    Raises as `read`.
    """
    config = files.config
    experts, notes = _read_experts(files, directories)
    sites = sorted({site for pairs in experts.values() for site in pairs}, key=natural_key)
    layerwise = config.flag("layerwise_scalings")
    if layerwise:
        sites = _as_peft_counts(sites)
    outputs = len(experts) * (len(sites) if layerwise else 1)
    what = f"{len(experts)} experts" + (f" at each of {len(sites)} linears" if layerwise else "")
    _check_layers(config, files.weights, layers, outputs, what, lost)
    stack = tuple(layers.values())
    classifier = Classifier(
        stack if has_relu else (_product(stack),),
        len(experts),
        len(sites),
        layerwise,
        softmax=config.flag("enable_softmax", True),
        temperature=config.number("softmax_temperature", 1.0, above=0),
        top_k=_top_k(config, len(experts)),
        softmax_top_k=config.flag("enable_softmax_topk"),
        first_pass=config.number("scaling_pass_value", 0.0),
        non_granular_after=non_granular.read(config),
    )
    weight = config.number("global_scaling_weight", 1.0)
    mixtures = {
        site: ClassifierMixture(_stacked(site, experts, weight), place)
        for place, site in enumerate(sites)
    }
    return Adapter(
        "xlora",
        {site: mixtures[site] for site in sorted(mixtures, key=natural_key)},
        base_model,
        (*warnings, *notes),
        classifier=classifier,
    )


READER = Reader(
    PEFT_FILES,
    read,
    peft_types=("XLORA",),
    members=lambda config: named_places(config, _candidates),
)


def _candidates(name: str, path: str) -> list[str]:
    """Where the expert may lie, the best first."""
    return [name, PurePosixPath(path).name]


def named_places(config: Fields, candidates: Candidates) -> dict[str, list[str]]:
    """By an expert's name, the directories below that may be its, the best first. Raises
    ConfigError."""
    adapters = config.object("adapters")
    return {
        name: [
            each
            for each in candidates(name, adapters.text(name) or "")
            if members.is_below(each, LEVELS)
        ]
        for name in adapters.values
    }


def expert_directories(files: AdapterFiles, candidates: Candidates) -> dict[str, str]:
    """By an expert's name, in the order of the classifier's outputs. Raises ConfigError,
    LimitError, UnsupportedError."""
    adapters = files.config.object("adapters")
    if not adapters.values:
        raise files.config.error("adapters", "at least one adapter")
    if len(adapters.values) > files.limits.experts:
        expected = f"at most {files.limits.experts}"
        raise LimitError(adapters.where, f"{len(adapters.values)} adapters", expected)

    directories = {}
    for name, places in named_places(files.config, candidates).items():
        there = (each for each in places if (files.directory / each).is_dir())
        directories[name] = next(there, name)
        members.check_directory(files.directory, directories[name], adapters.where, LEVELS)
    if len(set(directories.values())) < len(directories):
        raise files.config.error("adapters", "a directory for every adapter")
    return directories


def _read_experts(
    files: AdapterFiles, directories: Mapping[str, str]
) -> tuple[dict[str, Pairs], tuple[str, ...]]:
    """The experts by name, and their warnings."""
    experts: dict[str, Pairs] = {}
    warnings: list[str] = []
    total = 0
    for name, directory in directories.items():
        with members.named(directory):
            adapter = files.read_member(files.directory / directory)
            experts[name] = _pairs(adapter)
        warnings += [f"{directory}: {warning}" for warning in adapter.warnings]
        total += adapter.num_bytes
        if total > files.limits.adapter_bytes:
            expected = f"at most {files.limits.adapter_bytes} bytes for all experts"
            raise LimitError(directory, f"{total} bytes up to here", expected)
    return experts, tuple(warnings)


def _pairs(adapter: Adapter) -> dict[str, Experts]:
    """Raises UnsupportedError for an expert that is no plain LoRA of linears."""
    expected = "a plain LoRA of linears in every expert of an X-LoRA"
    if adapter.kind != "lora":
        raise UnsupportedError("adapter_config.json: peft_type", adapter.kind, expected)
    if adapter.invocation_tokens:
        raise UnsupportedError("alora_invocation_tokens", "an activated LoRA", expected)
    for name in (*adapter.rows, *adapter.biases):
        raise UnsupportedError(name, "trained rows or biases", expected)
    pairs = {}
    for site, mixture in adapter.sites.items():
        if not isinstance(mixture, LinearMixture) or not is_plain(mixture):
            raise UnsupportedError(site, "more than a low-rank pair", expected)
        pairs[site] = mixture.experts
    return pairs


def _as_peft_counts(sites: Sequence[str]) -> list[str]:
    """In the order in which Transformers' model has them. Raises UnsupportedError where names do
    not tell."""

    def key(site: str) -> tuple[int, int]:
        number, path = split_layer(site) or (0, site)
        if path not in _IN_ORDER:
            found = "layerwise_scalings on a linear whose number in PEFT its name does not tell"
            raise UnsupportedError(site, found, f"one of {', '.join(_IN_ORDER)}")
        return number, _IN_ORDER.index(path)

    return sorted(sites, key=key)


def _stacked(site: str, experts: Mapping[str, Pairs], weight: float) -> Experts:
    """All experts side by side; one that leaves the linear as it is has a pair of zeros there.
    weight: of all their outputs."""
    named = [(name, pairs[site]) for name, pairs in experts.items() if site in pairs]
    first = named[0][1]
    for name, pair in named[1:]:
        check_alike(name, site, pair, first)
    nothing = Experts(torch.zeros(1, first.a.shape[1]), torch.zeros(first.b.shape[0], 1), (1,))
    whole = stack_up(pairs.get(site, nothing) for pairs in experts.values())
    return Experts(whole.a, whole.b * weight, whole.ranks)


def _check_layers(
    config: Fields, weights: Weights, layers: Layers, outputs: int, what: str, lost: str
) -> None:
    """what: the outputs are for. Raises ConfigError, ShapeError."""
    depth = config.integer("xlora_depth", 1)
    if len(layers) != depth:
        where, found = f"{weights.file}: the classifier", f"{len(layers)} layers"
        raise ShapeError(where, found, f"the config's xlora_depth {depth}{lost}")
    widths = [config.integer("hidden_size", 4096)]
    widths += [config.integer("xlora_size", 2048)] * (depth - 1)
    fields = ["hidden_size", *["xlora_size"] * (depth - 1)]
    for (name, (weight, bias)), field, width in zip(layers.items(), fields, widths, strict=True):
        if weight.shape[1] != width:
            where, found = weights.where(f"{name}.weight"), f"{weight.shape[1]} inputs"
            raise ShapeError(where, found, f"the config's {field} {width}")
        if len(bias) != len(weight):
            raise ShapeError(weights.where(f"{name}.bias"), list(bias.shape), [len(weight)])
    expected = [
        *(f"the config's xlora_size {width}" for width in widths[1:]),
        f"{outputs}, for {what}",
    ]
    for (name, (weight, _)), number, text in zip(
        layers.items(), [*widths[1:], outputs], expected, strict=True
    ):
        if len(weight) != number:
            raise ShapeError(weights.where(f"{name}.weight"), f"{len(weight)} outputs", text)


def _product(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer that does what these do, one after the other."""
    weight, bias = layers[0][0].double(), layers[0][1].double()
    for next_weight, next_bias in layers[1:]:
        weight = next_weight.double() @ weight
        bias = next_weight.double() @ bias + next_bias.double()
    return weight.float(), bias.float()


def _layers(weights: Weights) -> Layers:
    """Weight and bias by what precedes their names, in order."""
    stems: dict[int, str] = {}
    for name in weights.tensors:
        match = _KEY.fullmatch(name)
        if match is None:
            expected = "internal_xlora_classifier.layers.{n}.weight or .bias"
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
        stems[int(match["n"])] = name.removesuffix(f".{match['part']}")
    if not stems:
        where = f"{weights.file}: internal_xlora_classifier.layers.0.weight"
        raise MissingTensorError(where, "no such tensor", f"the classifier of an X-LoRA{_LOST}")
    return {
        stem: (weights.tensor(f"{stem}.weight", 2), weights.tensor(f"{stem}.bias", 1))
        for _, stem in sorted(stems.items())
    }


def _top_k(config: Fields, experts: int) -> int | None:
    if not config.has("top_k_lora"):
        return None
    top_k = config.integer("top_k_lora")
    if top_k > experts:
        expected = f"at most {experts}, as many as there are adapters"
        raise UnsupportedError(f"{config.where}: top_k_lora", top_k, expected)
    return top_k


def general_warnings(config: Fields) -> tuple[str, ...]:
    """Whoever wrote it. Raises ConfigError."""
    tokens = non_granular.read(config)
    return (
        _WARNING,
        *([_NORMALISED] if config.flag("enable_softmax_topk") else []),
        *([] if tokens is None else [non_granular.warning(tokens)]),
    )


def _warnings(config: Fields) -> tuple[str, ...]:
    names: list[Any] = list(config.object("adapters").values)
    numbered = names == [str(i) for i in range(len(names))]
    unnumbered = (
        "adapters: PEFT applies experts only where they are called 0, 1, 2 and so on; they are "
        "served in the order of the config, whatever they are called"
    )
    return (
        *general_warnings(config),
        *([] if numbered else [unnumbered]),
        *known.warnings(config, known.FIELDS["xlora"]),
    )
