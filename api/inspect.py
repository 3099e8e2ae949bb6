"""`molehill inspect`: what an adapter is, how it would be served, and what is wrong with it."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from molehill.engine import formats
from molehill.engine.adapter import Adapter, describe_policy
from molehill.engine.errors import AdapterError
from molehill.engine.formats import DEFAULT_LIMITS
from molehill.engine.huggingface import base_model
from molehill.engine.plan import SitePlan, plan
from molehill.engine.validation import problems
from molehill.kernels.policy import Constant, Policy

_SHOWN_PROBLEMS = 20
_WIDEST = 240


@dataclass
class Group:
    """Sites that differ in nothing but their layer."""

    pattern: str
    plan: SitePlan
    layers: list[int] = field(default_factory=list)
    bytes: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="adapter directory")
    parser.add_argument("--model", help="base model to check against: a directory or cached name")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """0 if the adapter can be served, 1 if there are problems."""
    try:
        adapter = formats.read(args.path)
    except AdapterError as error:
        return _unreadable(error, as_json=args.json)
    found: list[AdapterError] = []
    if args.model:
        try:
            base = base_model(args.model)
        except (OSError, ValueError) as error:
            print(f"--model {args.model}: {error}", file=sys.stderr)
            return 1
        found = problems(adapter, base, DEFAULT_LIMITS)
    if args.json:
        print(json.dumps(report(adapter, found), indent=2))
    else:
        _print(adapter, found, args.model)
    return 1 if found else 0


def report(adapter: Adapter, found: Sequence[AdapterError]) -> dict[str, Any]:
    """All that is known of an adapter, as plain JSON."""
    return {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "base_model": adapter.base_model,
        "bytes": adapter.num_bytes,
        "warnings": list(adapter.warnings),
        "problems": [_problem(error) for error in found],
        "sites": [site.as_json() for site in plan(adapter)],
    }


def _problem(error: AdapterError) -> dict[str, str]:
    return {
        "type": error.kind,
        "where": error.where,
        "found": error.found,
        "expected": error.expected,
    }


def _unreadable(error: AdapterError, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"problems": [_problem(error)]}, indent=2))
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _print(adapter: Adapter, found: Sequence[AdapterError], model: str | None) -> None:
    console = Console()
    sites = plan(adapter)
    table = _table(sites)
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(_summary(adapter, sites))
    console.print(table)
    for warning in adapter.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)
    for error in found[:_SHOWN_PROBLEMS]:
        line = f"[red]{type(error).__name__}[/] {escape(str(error))}"
        console.print(line, highlight=False, soft_wrap=True)
    if len(found) > _SHOWN_PROBLEMS:
        console.print(f"... and {len(found) - _SHOWN_PROBLEMS} more problems")
    if model and not found:
        console.print(f"[green]fits[/] {escape(model)}", highlight=False, soft_wrap=True)


def _summary(adapter: Adapter, sites: Sequence[SitePlan]) -> Table:
    static = sum(site.static for site in sites)
    table = Table.grid(padding=(0, 2))
    rows = {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "base model": adapter.base_model or "not named",
        "routing": "; ".join(_routings(sites)) or "none (plain LoRA)",
        "sites": f"{len(sites)}: {static} static, {len(sites) - static} dynamic",
        "size": f"{_size(adapter.num_bytes)} in float32",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def _routings(sites: Iterable[SitePlan]) -> list[str]:
    routed = (site.policy for site in sites if not isinstance(site.policy, Constant))
    return list(dict.fromkeys(map(_routing, routed)))


def _routing(policy: Policy) -> str:
    described = describe_policy(policy)
    name = described.pop("policy")
    parameters = ", ".join(f"{key} {value}" for key, value in described.items())
    return f"{name} ({parameters})" if parameters else str(name)


def _table(sites: Sequence[SitePlan]) -> Table:
    rows = {_name(group): group for group in groups(sites)}
    table = Table("sites", "shape", "routing", "experts", "ranks", "size", "gate")
    for name, group in rows.items():
        site = group.plan
        table.add_row(
            escape(name),
            site.shape,
            type(site.policy).__name__,
            str(site.experts),
            _ranks(site),
            _size(group.bytes),
            f"{'static' if site.static else 'dynamic'}: {site.reason}",
        )
    return table


def groups(sites: Iterable[SitePlan]) -> list[Group]:
    """Sites of the same plan in different layers, `layers.*.mlp`, in the order they come."""
    found: dict[tuple[Any, ...], Group] = {}
    for site in sites:
        match = re.match(r"layers\.(\d+)\.", site.site)
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", site.site)
        ranks = tuple(site.ranks.items())
        key = (pattern, site.policy, site.experts, ranks, site.static, site.reason)
        group = found.setdefault(key, Group(pattern, site))
        group.bytes += site.bytes
        if match:
            group.layers.append(int(match[1]))
    return list(found.values())


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
    stacks = {name: _uniform(ranks) for name, ranks in site.ranks.items()}
    if len(set(stacks.values())) == 1 and site.shape == "linear":
        return next(iter(stacks.values()))
    return ", ".join(f"{name.removesuffix('_proj')} {ranks}" for name, ranks in stacks.items())


def _uniform(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else "/".join(map(str, ranks))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
