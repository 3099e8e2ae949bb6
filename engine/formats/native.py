"""molehill's own layout: the canonical adapter as it is, one JSON and one safetensors file.

`molehill.json` holds all of the adapter but its tensors, with its digest; `molehill.safetensors`
the tensors by their canonical names. docs/format.md describes both, field by field.
"""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import CorruptFileError, ShapeError, UnsupportedError
from molehill.engine.adapter.model import (
    TOKEN_TABLE,
    Adapter,
    TokenAdapters,
    bias_tensor,
    classifier_tensor,
    describe,
    token_prefix,
)
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import invocation, non_granular
from molehill.engine.formats.readers.policies import parse_policy
from molehill.engine.formats.readers.reader import FileNames, Reader
from molehill.engine.system.atomic_directory import appearing
from molehill.engine.system.out_of_memory import raise_if_out_of_memory
from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
    VocabularyRows,
)
from molehill.kernels.policy import Policy

CONFIG = "molehill.json"
WEIGHTS = "molehill.safetensors"
FORMAT_VERSION = 1
ROWS = "rows"

_FIELDS = (
    "format_version",
    "digest",
    "base_model",
    "warnings",
    "kind",
    "sites",
    ROWS,
    "biases",
    "by_token",
    "classifier",
    invocation.FIELD,
)
# Of an adapter by token inside another.
_MEMBER_FIELDS = ("name", "kind", "sites", ROWS, "biases")
_FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def write(adapter: Adapter, directory: Path) -> None:
    """Writes the adapter to a new directory, which appears whole or not at all.

    Raises FileExistsError if there is a directory with files in it already, OSError.
    """
    with appearing(directory) as partial:
        tensors = {name: tensor.clone().contiguous() for name, tensor in adapter.tensors()}
        try:
            safetensors.torch.save_file(tensors, partial / WEIGHTS)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None
        (partial / CONFIG).write_text(json.dumps(_document(adapter), indent=1, allow_nan=False))


def _document(adapter: Adapter) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "digest": adapter.digest,
        "base_model": adapter.base_model,
        "warnings": list(adapter.warnings),
        **describe(adapter),
    }


def read(directory: Path, limits: Limits) -> Adapter:
    """What `write` wrote, with its digest checked.

    Raises ConfigError, CorruptFileError, LimitError, MissingTensorError, NonFiniteError,
    ShapeError, UnsupportedError (another version, an unknown field or tensor).
    """
    return _read(files.read_config(directory, CONFIG), directory, limits)


def _read(config: Fields, directory: Path, limits: Limits) -> Adapter:
    version = config.integer("format_version")
    if version != FORMAT_VERSION:
        where = f"{CONFIG}: format_version"
        raise UnsupportedError(where, version, f"{FORMAT_VERSION}, this version's")
    config.only(*_FIELDS)
    kind, digest = _required(config, "kind"), _required(config, "digest")
    warnings = config.values.get("warnings") or []
    if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
        raise config.error("warnings", "a list of strings")
    if not (directory / WEIGHTS).exists():
        raise CorruptFileError(WEIGHTS, "no such file", f"the tensors of {CONFIG}")
    weights = files.read_tensors(directory / WEIGHTS, limits)
    adapter = replace(
        _content(config, weights, kind),
        base_model=config.text("base_model"),
        warnings=tuple(warnings),
        invocation_tokens=invocation.read(config),
    )
    _check_all_used(adapter, weights)
    if adapter.digest != digest:
        raise CorruptFileError(WEIGHTS, adapter.digest, f"the digest {digest}")
    return adapter


READER = Reader(
    FileNames(CONFIG, (WEIGHTS,)),
    lambda native: _read(native.config, native.directory, native.limits),
    no_layout=f"{CONFIG} has every expert by itself",
)


def read_stored(directory: Path, pause: Callable[[], None] = lambda: None) -> Adapter:
    """What `write` wrote where nobody else writes, for a worker that has steps to run meanwhile.

    It was checked as it was written; what is checked again is its digest. Raises CorruptFileError,
    MemoryError.

    pause: called now and then, for the steps' sake.
    """
    try:
        config = files.read_config(directory, CONFIG)
        weights = Weights(WEIGHTS, files.read_floats(directory / WEIGHTS))
        pause()
        adapter = replace(
            _content(config, weights, _required(config, "kind")),
            base_model=config.text("base_model"),
            invocation_tokens=invocation.read(config),
        )
    except CorruptFileError:
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        raise CorruptFileError(directory, error, "the store's own copy") from error
    pause()
    if adapter.digest != config.text("digest"):
        raise CorruptFileError(WEIGHTS, adapter.digest, f"the digest {config.text('digest')}")
    return adapter


def _content(config: Fields, weights: Weights, kind: str) -> Adapter:
    """What an adapter does, and one by token does with its share of the tensors."""
    sites = config.object("sites")
    return Adapter(
        kind=kind,
        sites={site: _mixture(weights, site, sites.object(site)) for site in sites.values},
        rows={site: _rows(weights, site) for site in config.texts(ROWS)},
        biases=_biases(config, weights),
        by_token=_by_token(config, weights),
        classifier=_classifier(config, weights),
    )


def _by_token(config: Fields, weights: Weights) -> TokenAdapters | None:
    """Raises ConfigError, MissingTensorError, UnsupportedError."""
    if not config.has("by_token"):
        return None
    fields = config.object("by_token")
    fields.only("adapters", "other")
    other = fields.number("other")
    if other != int(other):
        raise fields.error("other", "a whole number")
    members = fields.items("adapters")
    adapters = {}
    for place in members.values:
        member, prefix = members.object(place), token_prefix(int(place))
        member.only(*_MEMBER_FIELDS)
        named = {n.removeprefix(prefix): n for n in weights.tensors if n.startswith(prefix)}
        tensors = {name: weights.tensors[spelling] for name, spelling in named.items()}
        name = _required(member, "name")
        if name in adapters:
            raise member.error("name", "every adapter once")
        share = Weights(weights.file, tensors, named)
        adapters[name] = _content(member, share, _required(member, "kind"))
    return TokenAdapters(adapters, weights.tensor(TOKEN_TABLE, 1).long(), int(other))


def _required(config: Fields, name: str) -> str:
    text = config.text(name)
    if not text:
        raise config.error(name, "a string, not empty")
    return text


def _check_all_used(adapter: Adapter, weights: Weights) -> None:
    unknown = set(weights.tensors) - {name for name, _ in adapter.tensors()}
    if unknown:
        expected = f"only the tensors of {CONFIG}"
        raise UnsupportedError(weights.where(min(unknown)), "an unknown tensor", expected)


def _rows(weights: Weights, site: str) -> VocabularyRows:
    ids, rows = weights.tensor(f"{site}.row_ids", 1), weights.tensor(f"{site}.rows", 2)
    if len(ids) != len(rows):
        raise ShapeError(weights.where(f"{site}.rows"), list(rows.shape), [len(ids), rows.shape[1]])
    return VocabularyRows(ids.long(), rows)


def _biases(config: Fields, weights: Weights) -> dict[str, Bias]:
    """Raises ConfigError, MissingTensorError."""
    if not config.has("biases"):
        return {}
    parts = config.object("biases")
    biases = {}
    for site in parts.values:
        names = parts.texts(site)
        if not names or not set(names) <= {"trained", "added"}:
            raise parts.error(site, "a list of trained or added")
        biases[site] = Bias(**{name: weights.tensor(bias_tensor(site, name), 1) for name in names})
    return biases


def _classifier(config: Fields, weights: Weights) -> Classifier | None:
    """Raises ConfigError, MissingTensorError, UnsupportedError."""
    if not config.has("classifier"):
        return None
    fields = config.object("classifier")
    fields.only(*Classifier.__dataclass_fields__)
    # One by one: a file may say any number of layers.
    names = (classifier_tensor(f"{i}.") for i in range(fields.integer("layers")))
    return Classifier(
        tuple((weights.tensor(f"{n}weight", 2), weights.tensor(f"{n}bias", 1)) for n in names),
        fields.integer("experts"),
        fields.integer("places"),
        fields.flag("layerwise"),
        fields.flag("softmax", True),
        fields.number("temperature", 1.0, above=0),
        fields.integer("top_k") if fields.has("top_k") else None,
        fields.flag("softmax_top_k"),
        fields.number("first_pass", 0.0),
        non_granular.read(fields),
    )


def _mixture(weights: Weights, site: str, fields: Fields) -> Mixture:
    shape = fields.choice("shape", (*_SHAPES, "classifier"))
    if shape == "classifier":
        return _classified(weights, site, fields)
    return _SHAPES[shape](weights, site, fields, parse_policy(fields.object("routing")))


def _linear(weights: Weights, site: str, fields: Fields, policy: Policy) -> LinearMixture:
    """A gate is constant, or has a router; DoRA's magnitude is for one constant pair."""
    fields.only("shape", "routing", "ranks")
    experts = _experts(weights, site, fields, "ranks")
    router, magnitude = f"{site}.router", f"{site}.magnitude"
    if policy.constant_weights is None:
        if magnitude in weights.tensors:
            found = f"a magnitude beside {type(policy).__name__}"
            raise UnsupportedError(weights.where(magnitude), found, "none, as there is a router")
        return LinearMixture(
            experts,
            policy,
            weights.tensor(router, 2),
            parameters=_parameters(weights, site, policy),
            shared=_shared(weights, site),
        )
    if len(policy.constant_weights) != len(experts.ranks):
        expected = f"one for each of {len(experts.ranks)} experts"
        raise fields.object("routing").error("weights", expected)
    if magnitude not in weights.tensors:
        return LinearMixture(experts, policy)
    if len(experts.ranks) != 1:
        found = f"a magnitude beside {len(experts.ranks)} experts"
        raise UnsupportedError(weights.where(magnitude), found, "one expert")
    return LinearMixture(experts, policy, magnitude=weights.tensor(magnitude, 1))


def _ffn(weights: Weights, site: str, fields: Fields, policy: Policy) -> FfnMixture:
    fields.only("shape", "routing", "ranks", "activation")
    _check_routed(fields, policy)
    ranks = fields.object("ranks")
    ranks.only(*_FFN_PROJECTIONS)
    stacks = {name: _experts(weights, f"{site}.{name}", ranks, name) for name in ranks.values}
    magnitudes = {
        name: weights.tensor(f"{site}.{name}.magnitude", 2)
        for name in stacks
        if f"{site}.{name}.magnitude" in weights.tensors
    }
    router = weights.tensor(f"{site}.router", 2)
    parameters = _parameters(weights, site, policy)
    activation = fields.text("activation")
    return FfnMixture(stacks, policy, router, activation, parameters, magnitudes)


def _scale(weights: Weights, site: str, fields: Fields, policy: Policy) -> ScaleMixture:
    fields.only("shape", "routing", "of")
    _check_routed(fields, policy)
    of: Literal["output", "input"] = (
        "output" if fields.choice("of", ("output", "input")) == "output" else "input"
    )
    vectors = weights.tensor(f"{site}.vectors", 3)
    return ScaleMixture(vectors, policy, weights.tensor(f"{site}.router", 2), of)


def _reflection(weights: Weights, site: str, fields: Fields, policy: Policy) -> Reflection:
    fields.only("shape", "routing")
    reflection = Reflection(weights.tensor(f"{site}.a", 2), weights.tensor(f"{site}.u", 2))
    if policy != reflection.policy:
        expected = "Constant with the weight 1, as every token is reflected"
        raise UnsupportedError(f"{fields.where}: routing", type(policy).__name__, expected)
    return reflection


def _classified(weights: Weights, site: str, fields: Fields) -> ClassifierMixture:
    fields.only("shape", "place", "ranks")
    place = fields.number("place", at_least=0)
    if place != int(place):
        raise fields.error("place", "a whole number")
    return ClassifierMixture(_experts(weights, site, fields, "ranks"), int(place))


def _check_routed(fields: Fields, policy: Policy) -> None:
    if policy.constant_weights is not None:
        expected = "a policy that reads the router"
        raise UnsupportedError(f"{fields.where}: routing", type(policy).__name__, expected)


def _parameters(weights: Weights, site: str, policy: Policy) -> Tensor | None:
    """Those that the policy learned. Raises MissingTensorError, ShapeError."""
    if not policy.num_parameters:
        return None
    name = f"{site}.parameters"
    parameters = weights.tensor(name, 1)
    if parameters.shape[0] != policy.num_parameters:
        found, expected = list(parameters.shape), [policy.num_parameters]
        raise ShapeError(weights.where(name), found, expected)
    return parameters


def _shared(weights: Weights, site: str) -> Experts | None:
    """The pair that every token gets, if there is one. Raises MissingTensorError, ShapeError."""
    names = f"{site}.shared.a", f"{site}.shared.b"
    if not any(name in weights.tensors for name in names):
        return None
    a, b = (weights.tensor(name, 2) for name in names)
    if a.shape[0] != b.shape[1]:
        raise ShapeError(weights.where(names[1]), list(b.shape), [b.shape[0], a.shape[0]])
    return Experts(a, b, (a.shape[0],))


def _experts(weights: Weights, stem: str, fields: Fields, name: str) -> Experts:
    ranks = fields.values.get(name)
    if not isinstance(ranks, list) or not all(type(r) is int and r > 0 for r in ranks):
        raise fields.error(name, "a list of ranks")
    a, b = weights.tensor(f"{stem}.a", 2), weights.tensor(f"{stem}.b", 2)
    for half, rows in (("a", a.shape[0]), ("b", b.shape[1])):
        if rows != sum(ranks):
            raise ShapeError(weights.where(f"{stem}.{half}"), rows, f"the ranks' sum {sum(ranks)}")
    return Experts(a, b, tuple(ranks))


_SHAPES: dict[str, Callable[[Weights, str, Fields, Policy], Mixture]] = {
    "linear": _linear,
    "ffn": _ffn,
    "scale": _scale,
    "reflection": _reflection,
}
