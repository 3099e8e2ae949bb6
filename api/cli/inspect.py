"""`molehill inspect`: what an adapter is, how it would be served, and what is wrong with it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement

from molehill.api.adapters.chat import AdapterChat, differences, served_texts, without_rows
from molehill.api.cli import base_chats, probe_prompts, tables
from molehill.api.cli.arguments import JSON, LAYOUT, RESIDUAL, TOLERANCE
from molehill.engine import formats
from molehill.engine.adapter.added_tokens import (
    ANY_NUMBER,
    NO_TOKENS,
    AddedTokens,
    added_tokens,
)
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import problems
from molehill.engine.formats import DEFAULT_LIMITS
from molehill.engine.formats.io import tokenizer_files
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge import merge_static
from molehill.engine.transform.plan import SitePlan, plan

_SHOWN_PROBLEMS = 20
_WIDEST = 240


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see `run`."""
    parser = argparse.ArgumentParser(prog="molehill inspect")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="adapter directory")
    parser.add_argument("--model", help="base model to check against: a directory or cached name")
    TOLERANCE.add_to(parser, 0.0)
    LAYOUT.add_to(parser)
    RESIDUAL.add_to(parser, False)
    JSON.add_to(parser, False)


def run(args: argparse.Namespace) -> int:
    """0 if the adapter can be served, 1 if there are problems."""
    errors: list[AdapterError] = []
    base, change = None, None
    try:
        base = base_model(args.model) if args.model else None
        if base is not None:
            base = replace(base, extra_tokens=ANY_NUMBER)
    except (ImportError, OSError, ValueError) as error:
        return _unusable_model(args.model, error)
    try:
        adapter = formats.read(
            args.path,
            lora_b_layout=args.lora_b_layout,
            base=base,
            base_is_residual=args.base_is_residual,
        )
        tokenizer = tokenizer_files.read(args.path)
    except AdapterError as error:
        return _unreadable(error, as_json=args.json)
    if base is not None:
        errors = problems(adapter, base, DEFAULT_LIMITS)
        try:
            change = None if errors else _logit_change(args, adapter, base)
        except (ImportError, OSError, ValueError) as error:
            return _unusable_model(args.model, error)
    chat = differences(tokenizer, base_chats.of_model(args.model))
    num_tokens = None if base is None else base.num_tokens
    added = added_tokens(adapter, num_tokens)
    unserved = without_rows(chat, served_texts(chat, added, num_tokens)) if base else ()
    adapter = replace(adapter, warnings=(*adapter.warnings, *chat.warnings, *unserved))
    sites = plan(adapter, base, args.merge_tolerance)
    if args.json:
        print(json.dumps(report(adapter, sites, errors, change, chat, added), indent=2))
    else:
        _print(adapter, sites, errors, args.model, change, chat, added)
    return 1 if errors else 0


def _unusable_model(model: str, error: Exception) -> int:
    print(f"--model {model}: {error}", file=sys.stderr)
    return 1


def _logit_change(
    args: argparse.Namespace, adapter: Adapter, base: BaseModel
) -> probe_prompts.LogitChange | None:
    """What a lossy merge changes; None where it is exact."""
    merged, merges = merge_static(adapter, base, args.merge_tolerance)
    if not any(merge.error for merge in merges):
        return None
    return probe_prompts.logit_change(args.model, adapter, merged)


def report(
    adapter: Adapter,
    sites: Sequence[SitePlan],
    errors: Sequence[AdapterError],
    change: probe_prompts.LogitChange | None = None,
    chat: AdapterChat | None = None,
    added: AddedTokens = NO_TOKENS,
) -> dict[str, Any]:
    """All that is known of an adapter, as plain JSON."""
    return {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "base_model": adapter.base_model,
        "alora_invocation_tokens": list(adapter.invocation_tokens) or None,
        "chat": None if chat is None else chat.shown(),
        "bytes": adapter.num_bytes,
        "warnings": list(adapter.warnings),
        "problems": [_problem(error) for error in errors],
        "per_token": asdict(tables.totals(sites)),
        "logit_change": None if change is None else change.as_json(),
        "sites": [site.as_json() for site in sites],
        "rows": {site: len(table.ids) for site, table in adapter.rows.items()},
        "added_tokens": list(added.needed),
        "biases": {site: list(bias.tensors()) for site, bias in adapter.biases.items()},
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


def _print(
    adapter: Adapter,
    sites: Sequence[SitePlan],
    errors: Sequence[AdapterError],
    model: str | None,
    change: probe_prompts.LogitChange | None,
    chat: AdapterChat,
    added: AddedTokens,
) -> None:
    console = Console()
    table = tables.site_table(sites)
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(tables.summary(adapter, sites, chat, added))
    console.print(table)
    if change is not None:
        console.print(f"[yellow]merged[/] logits {change}", highlight=False, soft_wrap=True)
    for warning in adapter.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)
    for error in errors[:_SHOWN_PROBLEMS]:
        line = f"[red]{type(error).__name__}[/] {escape(str(error))}"
        console.print(line, highlight=False, soft_wrap=True)
    if len(errors) > _SHOWN_PROBLEMS:
        console.print(f"... and {len(errors) - _SHOWN_PROBLEMS} more problems")
    if model and not errors:
        console.print(f"[green]fits[/] {escape(model)}", highlight=False, soft_wrap=True)
