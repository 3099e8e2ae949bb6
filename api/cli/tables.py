"""An adapter's plan as tables for people."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from rich.markup import escape
from rich.table import Table

from molehill.api.adapters.chat import AdapterChat
from molehill.engine.adapter.added_tokens import NO_TOKENS, AddedTokens
from molehill.engine.adapter.model import Adapter, layer_of
from molehill.engine.transform.plan import SitePlan, share
from molehill.kernels.policy import Policy

# Width of the last column, so that a table of common names and ranks fits into 100.
_GATE = 20


@dataclass
class Group:
    """Sites that differ in nothing but their layer and, by less than is shown, their error."""

    pattern: str
    plan: SitePlan
    layers: list[int] = field(default_factory=list)
    bytes: int = 0


@dataclass(frozen=True)
class CostTotals:
    """Sums over sites; shares are of the base's own linears at those sites, None if not known."""

    flops: int
    bytes: int
    flops_share: float | None
    bytes_share: float | None


def totals(sites: Iterable[SitePlan]) -> CostTotals:
    costs = [site.cost for site in sites]
    flops, read = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    bases = [(cost.base_flops, cost.base_bytes) for cost in costs]
    if any(flop is None for flop, _ in bases):
        return CostTotals(flops, read, None, None)
    base_flops, base_read = (sum(base[i] or 0 for base in bases) for i in (0, 1))
    return CostTotals(flops, read, share(flops, base_flops), share(read, base_read))


def summary(
    adapter: Adapter, sites: Sequence[SitePlan], chat: AdapterChat, added: AddedTokens = NO_TOKENS
) -> Table:
    """Everything that is said once."""
    static = sum(site.static for site in sites)
    merged = [site for site in sites if site.merged is not None]
    total = totals(sites)
    table = Table.grid(padding=(0, 2))
    rows = {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "base model": adapter.base_model or "not named",
        "acts": _activation(adapter),
        "chat": _chat(chat),
        "routing": _by_token(adapter)
        or _by_classifier(adapter)
        or "; ".join(_routings(sites))
        or "none (plain LoRA)",
        "sites": f"{len(sites)}: {static} static, {len(sites) - static} dynamic",
        **({"vocabulary": _rows(adapter, added)} if adapter.rows else {}),
        **({"biases": _biases(adapter)} if adapter.biases else {}),
        "size": f"{_size(adapter.num_bytes)} in float32",
        "merging": _merging(merged),
        "per token": f"+{_flops(total.flops)} ({_percent(total.flops_share)}), "
        f"+{_size(total.bytes)} read ({_percent(total.bytes_share)}), "
        "over the base's linears there",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def _by_token(adapter: Adapter) -> str:
    if adapter.by_token is None:
        return ""
    return f"the token's id chooses one of {', '.join(adapter.by_token.adapters)}, or none"


def _by_classifier(adapter: Adapter) -> str:
    """Of an X-LoRA. PEFT before its pull request 2793 normalised over all tokens."""
    classifier = adapter.classifier
    if classifier is None:
        return ""
    later = classifier.non_granular_after
    top_k = [] if classifier.top_k is None else [f"the {classifier.top_k} greatest kept"]
    parts = [
        f"a classifier of {len(classifier.layers)} layers on the base's last hidden state",
        f"{classifier.experts} experts",
        f"scalings for each of {classifier.places} linears"
        if classifier.layerwise
        else "the same scalings for all linears",
        *([f"softmax at temperature {classifier.temperature:g}"] if classifier.softmax else []),
        *top_k,
        *(["normalised by softmax for each token"] if classifier.softmax_top_k else []),
        *([] if later is None else [f"for the first {later} tokens of an answer, then kept"]),
    ]
    return ", ".join(parts)


def _rows(adapter: Adapter, added: AddedTokens) -> str:
    """Rows of its own, and what a server needs for added tokens."""
    rows = [f"{len(table.ids)} rows of {site}" for site, table in sorted(adapter.rows.items())]
    ids = added.needed
    if ids:
        rows.append(f"{len(ids)} added tokens (--extra-vocab {ids[-1] + 1 - added.first})")
    return ", ".join(rows)


def _biases(adapter: Adapter) -> str:
    biases = adapter.biases.values()
    trained = sum(bias.trained is not None for bias in biases)
    added = sum(bias.added is not None for bias in biases)
    return f"{trained} trained in place of the base's, {added} added to linears"


def _activation(adapter: Adapter) -> str:
    tokens = ", ".join(map(str, adapter.invocation_tokens))
    return (
        f"from tokens {tokens} on, where the prompt has them last" if tokens else "on every token"
    )


def _chat(chat: AdapterChat) -> str:
    """What it has of its own."""
    templates = [
        f"template {name}, {len(text)} characters" for name, text in chat.templates.items()
    ]
    special = [f"{name} {token!r}" for name, token in chat.special_tokens.items()]
    stops = [f"ends at {', '.join(map(str, chat.stop_token_ids))}"] if chat.stop_token_ids else []
    return "; ".join([*templates, *special, *stops]) or "as the base"


def _merging(merged: Sequence[SitePlan]) -> str:
    if not merged:
        return "nothing to merge"
    before = sum(sum(map(sum, site.ranks.values())) for site in merged)
    after = sum(sum((site.merged or {}).values()) for site in merged)
    worst = max(site.error for site in merged)
    lossy = f"; error at most {worst:.3g}, an approximation" if worst else ""
    return f"{len(merged)} sites, {before} rank rows to {after}{lossy}"


def site_table(sites: Sequence[SitePlan]) -> Table:
    """A row per group of sites; FLOPs and bytes are those of one token over the base's there."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("sites", "experts", "ranks", "size", "FLOPs", "bytes", "gate"):
        table.add_column(name, no_wrap=True)
    for group in groups(sites):
        site = group.plan
        cost = site.cost
        table.add_row(
            escape(_name(group)),
            str(site.experts),
            _ranks(site),
            _size(group.bytes),
            _percent(share(cost.flops, cost.base_flops)),
            _percent(share(cost.bytes, cost.base_bytes)),
            fill(f"{'static' if site.static else 'dynamic'}: {site.reason}", _GATE),
        )
    return table


def groups(sites: Iterable[SitePlan]) -> list[Group]:
    """Sites of the same plan in different layers, `layers.*.mlp`, in the order they come."""
    result: dict[tuple[Any, ...], Group] = {}
    for site in sites:
        layer = layer_of(site.site)
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", site.site)
        ranks, merged = tuple(site.ranks.items()), tuple((site.merged or {}).items())
        key = (pattern, site.policy, site.experts, ranks, merged, site.static, site.reason)
        group = result.setdefault(key, Group(pattern, site))
        group.bytes += site.bytes
        if layer is not None:
            group.layers.append(layer)
    return list(result.values())


def _routings(sites: Iterable[SitePlan]) -> list[str]:
    policies = (site.policy for site in sites if site.policy is not None)
    routed = (policy for policy in policies if policy.constant_weights is None)
    return list(dict.fromkeys(map(_routing, routed)))


def _routing(policy: Policy) -> str:
    described = policy.to_json()
    name = described.pop("policy")
    parameters = ", ".join(f"{key} {value}" for key, value in described.items())
    return f"{name} ({parameters})" if parameters else str(name)


def _name(group: Group) -> str:
    return group.pattern.replace("*", _spans(group.layers), 1)


def _spans(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as `0-2,5`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _ranks(site: SitePlan) -> str:
    """Each expert's rank, by projection in an FFN, and after an arrow what merging leaves."""
    stacks = {name: _uniform(ranks) for name, ranks in site.ranks.items()}
    if site.merged is not None:
        left = site.merged
        stacks = {n: f"{ranks} -> {left[n]}" if n in left else ranks for n, ranks in stacks.items()}
    if site.shape == "linear":
        return next(iter(stacks.values()))
    if len(stacks) == 3 and len(set(stacks.values())) == 1:
        return f"{next(iter(stacks.values()))} each"
    return ", ".join(f"{name.removesuffix('_proj')} {ranks}" for name, ranks in stacks.items())


def _uniform(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else "/".join(map(str, ranks))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"


def _flops(count: int) -> str:
    return f"{count / 1e6:.2f} MFLOP" if count >= 1e6 else f"{count / 1e3:.1f} kFLOP"


def _percent(part: float | None) -> str:
    return "?" if part is None else f"+{100 * part:.1f} %"
