"""Routing policies out of JSON: the fields of MoE-PEFT's configs, and molehill's own layout."""

from collections.abc import Callable, Mapping

from molehill.engine.adapter.errors import ConfigError
from molehill.engine.formats.io.fields import Fields
from molehill.kernels.policy import POLICIES, DynMoLE, Policy, Soft, TopK, TopP

# By MoE-PEFT's `routing_strategy`. Its default for a missing field is the default here. DynMoLE has
# three fields of molehill's own, without which it means what the official code does.
STRATEGIES: Mapping[str, Callable[[Fields], Policy]] = {
    "mixlora": lambda config: TopK(config.integer("top_k", 2)),
    "mixlora-dynamic": TopP.from_json,
    "mixlora-switch": lambda config: TopK(1, normalize=False),
    "mola": lambda config: TopK(config.integer("top_k", 2)),
    "loramoe": lambda config: Soft(),
    "dynmole": DynMoLE.from_json,
}


def parse_policy(described: Fields) -> Policy:
    """The inverse of `Policy.to_json`, every field present. Raises ConfigError."""
    policy = POLICIES[described.choice("policy", tuple(POLICIES))].from_json(described)
    found, expected = sorted(described.values), sorted(policy.to_json())
    if found != expected:
        raise ConfigError(described.where, found, expected)
    return policy
