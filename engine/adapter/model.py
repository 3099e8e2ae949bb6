"""The canonical adapter: what every file format is read into. Immutable and framework-neutral."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
    VocabularyRows,
)


@dataclass(frozen=True)
class Adapter:
    """A MoLE or LoRA adapter.

    kind: the method (`lora`, `dora`, `mixlora`, `mola`, `loramoe`, `hydralora`, `molora`,
        `dynmole`, `mole`, `adamole`, `ldmole`, `goat`, `flylora`, `moelora`, `arrow`, `mov`,
        `adalora`, `vera`, `loha`, `lokr`, `hra`, `miss`, `bone`, `ia3`, `xlora`), or
        `mix` for a static mix of others.
    sites: mixtures by the base model's module, without its leading `model.`:
        `layers.3.self_attn.q_proj` is a LinearMixture, ScaleMixture, Reflection or
        ClassifierMixture, `layers.3.mlp` an FfnMixture.
        Tensors are float32 on the CPU; scaling is folded into `b`.
    base_model: what the adapter says it was trained on, or None.
    rows: of the embedding and of the LM head, in the place of the base's, by site (`embed_tokens`,
        `lm_head`); a mixture there adds to them.
    invocation_tokens: ids that a prompt must hold, if the adapter is an activated one; it acts from
        their last occurrence on, see `activation`. Empty: it acts on every token.
    warnings: oddities that do not stop it from being served.
    biases: what is added to linears of the base, with a mixture on them or without, whatever they
        read; by name, as sites are.
    by_token: whole adapters in the place of sites, rows and biases, of which each token has one.
    classifier: what the gate weights of all ClassifierMixtures come from.
    """

    kind: str
    sites: Mapping[str, Mixture]
    base_model: str | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)
    invocation_tokens: tuple[int, ...] = ()
    rows: Mapping[str, VocabularyRows] = field(default_factory=dict)
    biases: Mapping[str, Bias] = field(default_factory=dict)
    by_token: "TokenAdapters | None" = None
    classifier: Classifier | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by a canonical name, sites in natural order, then biases; or those of the
        adapters by token, by their numbers."""
        for site in sorted(self.sites, key=natural_key):
            for name, tensor in site_tensors(self.sites[site]):
                yield f"{site}.{name}", tensor
        for site, table in sorted(self.rows.items()):
            yield f"{site}.row_ids", table.ids.float()
            yield f"{site}.rows", table.rows
        for site in sorted(self.biases, key=natural_key):
            for name, tensor in self.biases[site].tensors().items():
                yield bias_tensor(site, name), tensor
        if self.classifier is not None:
            for name, tensor in self.classifier.tensors():
                yield classifier_tensor(name), tensor
        if self.by_token is not None:
            yield TOKEN_TABLE, self.by_token.adapter_of.float()
            for i, adapter in enumerate(self.by_token.adapters.values()):
                for name, tensor in adapter.tensors():
                    yield f"{token_prefix(i)}{name}", tensor

    @property
    def num_sites(self) -> int:
        """Those of the adapters by token too."""
        members = () if self.by_token is None else self.by_token.adapters.values()
        return len(self.sites) + sum(adapter.num_sites for adapter in members)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in canonical float32."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all that decides its output: kind, policies, ranks, invocation tokens
        and tensor bytes."""
        sha = hashlib.sha256(json.dumps(describe(self), sort_keys=True).encode())
        for name, tensor in self.tensors():
            sha.update(f"\0{name}{list(tensor.shape)}".encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class TokenAdapters:
    """Adapters of which each token has one, or none, by its id (MoLoRA, arXiv 2603.15965).

    adapters: by name. adapter_of: int64 `[n]`, the place of a token id's among them, -1 for none.
    other: that of all ids from n on.
    """

    adapters: Mapping[str, Adapter]
    adapter_of: Tensor
    other: int = -1

    def of(self, ids: Tensor) -> Tensor:
        """int64, as `ids`: the place of each token's adapter, -1 for none. ids: none below 0."""
        table = self.adapter_of.to(ids.device)
        inside = table[ids.clamp(max=len(table) - 1)]
        return torch.where(ids < len(table), inside, self.other)

    def changed(self, change: Callable[[Adapter], Adapter]) -> "TokenAdapters":
        """With other adapters in the place of these."""
        adapters = {name: change(adapter) for name, adapter in self.adapters.items()}
        return replace(self, adapters=adapters)


TOKEN_TABLE = "by_token.adapter_of"


def token_prefix(place: int) -> str:
    """What the names of an adapter's tensors begin with, by its place in TokenAdapters."""
    return f"by_token.{place}."


def bias_tensor(site: str, part: str) -> str:
    """The canonical name of a part, `trained` or `added`, of a linear's Bias."""
    return f"{site}.bias.{part}"


def classifier_tensor(name: str) -> str:
    """The canonical name of a classifier's tensor, `0.weight` of its first layer."""
    return f"classifier.{name}"


def natural_key(name: str) -> list[str | int]:
    """Sorts `layers.10` after `layers.9`. Of any text: superscripts are digits, and no numbers."""
    return [f"{int(part):08d}" if part.isdecimal() else part for part in name.split(".")]


def layer_of(site: str) -> int | None:
    """The number of a site's layer; None outside of the numbered layers."""
    numbered = re.match(r"layers\.(\d+)\.", site)
    return int(numbered[1]) if numbered else None


def projection_of(site: str) -> str:
    """The last part of a site's name: `q_proj`, `mlp`; outside of the numbered layers all of it."""
    return site if layer_of(site) is None else site.rpartition(".")[2]


def site_tensors(mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one site: router, parameters, magnitude, `a`, `b` (by projection in an FFN),
    and those of a shared pair; of vectors router and `vectors`; of a reflection `a` and `u`."""
    if isinstance(mixture, Reflection):
        yield "a", mixture.a
        yield "u", mixture.u
        return
    if isinstance(mixture, ClassifierMixture):
        yield "a", mixture.experts.a
        yield "b", mixture.experts.b
        return
    if mixture.router is not None:
        yield "router", mixture.router
    if isinstance(mixture, ScaleMixture):
        yield "vectors", mixture.vectors
        return
    if mixture.parameters is not None:
        yield "parameters", mixture.parameters
    if isinstance(mixture, LinearMixture):
        if mixture.magnitude is not None:
            yield "magnitude", mixture.magnitude
        yield "a", mixture.experts.a
        yield "b", mixture.experts.b
        if mixture.shared is not None:
            yield "shared.a", mixture.shared.a
            yield "shared.b", mixture.shared.b
        return
    for projection, experts in sorted(mixture.experts.items()):
        if projection in mixture.magnitudes:
            yield f"{projection}.magnitude", mixture.magnitudes[projection]
        yield f"{projection}.a", experts.a
        yield f"{projection}.b", experts.b


def describe_mixture(mixture: Mixture) -> dict[str, Any]:
    """All of one site but its tensors, as plain JSON."""
    if isinstance(mixture, ClassifierMixture):
        ranks = list(mixture.experts.ranks)
        return {"shape": "classifier", "place": mixture.place, "ranks": ranks}
    policy = mixture.policy.to_json()
    if isinstance(mixture, Reflection):
        return {"shape": "reflection", "routing": policy}
    if isinstance(mixture, LinearMixture):
        return {"shape": "linear", "routing": policy, "ranks": list(mixture.experts.ranks)}
    if isinstance(mixture, ScaleMixture):
        return {"shape": "scale", "routing": policy, "of": mixture.of}
    return {
        "shape": "ffn",
        "routing": policy,
        "ranks": {name: list(experts.ranks) for name, experts in mixture.experts.items()},
        "activation": mixture.activation,
    }


def describe(adapter: Adapter) -> dict[str, Any]:
    """All of an adapter but its tensors, base name and warnings, as plain JSON."""
    sites = {name: describe_mixture(mixture) for name, mixture in adapter.sites.items()}
    described: dict[str, Any] = {"kind": adapter.kind, "sites": sites}
    if adapter.rows:
        described["rows"] = sorted(adapter.rows)
    if adapter.invocation_tokens:
        described["alora_invocation_tokens"] = list(adapter.invocation_tokens)
    if adapter.biases:
        described["biases"] = {site: list(b.tensors()) for site, b in adapter.biases.items()}
    if adapter.classifier is not None:
        described["classifier"] = adapter.classifier.to_json()
    if adapter.by_token is not None:
        members = adapter.by_token.adapters.items()
        described["by_token"] = {
            "adapters": [{"name": name, **describe(member)} for name, member in members],
            "other": adapter.by_token.other,
        }
    return described


__all__ = [
    "Adapter",
    "Bias",
    "Experts",
    "TokenAdapters",
    "bias_tensor",
    "classifier_tensor",
    "describe",
    "describe_mixture",
    "natural_key",
    "site_tensors",
    "token_prefix",
]
