"""Routing policies out of JSON: the fields of MoE-PEFT's configs, and molehill's own layout."""

from collections.abc import Callable, Mapping

from molehill.engine.adapter.errors import ConfigError
from molehill.engine.adapter.model import describe_policy
from molehill.engine.formats.io.fields import Fields
from molehill.kernels.policy import (
    AdaMoLE,
    Arrow,
    Constant,
    DynMoLE,
    Policy,
    Soft,
    Sparsegen,
    Threshold,
    TopK,
    TopP,
)


def _top_p(config: Fields) -> TopP:
    return TopP(
        top_p=config.number("top_p", 0.8, above=0, at_most=1),
        temperature=config.number("temperature", 0.0, at_least=0),
    )


def _dynmole(config: Fields) -> DynMoLE:
    """The last three fields are molehill's own; absent, the official code's semantics hold."""
    kind = config.choice("entropy_type", ("tsallis", "renyi"), "tsallis")
    return DynMoLE(
        top_p=config.number("top_p", 0.75, above=0, at_most=1),
        keep_top_k=config.integer("keep_top_k", 2),
        entropy_threshold=config.number("entropy_threshold", 0.9, at_least=0),
        entropy_index=config.number("entropy_index", 1.1, above=0, at_most=2),
        entropy_type="renyi" if kind == "renyi" else "tsallis",
        entropy_eps=config.number("entropy_eps", 1e-5, at_least=0, at_most=1),
        normalize_weights=config.flag("normalize_weights"),
        include_crossing=config.flag("include_crossing"),
        normalize_entropy=config.flag("normalize_entropy", True),
    )


def _constant(config: Fields) -> Constant:
    weights = config.items("weights")
    if not weights.values:
        raise config.error("weights", "a list of numbers")
    return Constant(tuple(weights.number(e) for e in weights.values))


# By MoE-PEFT's `routing_strategy`. Its default for a missing field is the default here.
STRATEGIES: Mapping[str, Callable[[Fields], Policy]] = {
    "mixlora": lambda config: TopK(config.integer("top_k", 2)),
    "mixlora-dynamic": _top_p,
    "mixlora-switch": lambda config: TopK(1, normalize=False),
    "mola": lambda config: TopK(config.integer("top_k", 2)),
    "loramoe": lambda config: Soft(),
    "dynmole": _dynmole,
}

_CLASSES: Mapping[str, Callable[[Fields], Policy]] = {
    "Constant": _constant,
    "Soft": lambda config: Soft(),
    "TopK": lambda config: TopK(config.integer("k"), config.flag("normalize", True)),
    "TopP": _top_p,
    "DynMoLE": _dynmole,
    "Threshold": lambda config: Threshold(config.number("threshold", at_least=0)),
    "Arrow": lambda config: Arrow(config.integer("k"), config.number("temperature", above=0)),
    "AdaMoLE": lambda config: AdaMoLE(config.number("max_threshold", at_least=0)),
    "Sparsegen": lambda config: Sparsegen(config.integer("hidden")),
}


def parse_policy(described: Fields) -> Policy:
    """The inverse of `describe_policy`, every field present. Raises ConfigError."""
    policy = _CLASSES[described.choice("policy", tuple(_CLASSES))](described)
    found, expected = sorted(described.values), sorted(describe_policy(policy))
    if found != expected:
        raise ConfigError(described.where, found, expected)
    return policy
