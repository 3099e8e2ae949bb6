"""`molehill merge`: a static adapter as a plain PEFT LoRA, or merged into its base model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molehill.api.cli import convert, probe_prompts
from molehill.api.cli.arguments import JSON, LAYOUT, RESIDUAL, TOLERANCE
from molehill.engine.adapter.base_weights import directory_of
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import DEFAULT_LIMITS
from molehill.engine.formats.convert.peft_writer import write_lora
from molehill.engine.hf.shapes import base_model
from molehill.engine.system.atomic_directory import check_free
from molehill.engine.transform.merge import SiteMerge, merge_static
from molehill.engine.transform.merge_checkpoint import merge_checkpoint

USER_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see `run`."""
    parser = argparse.ArgumentParser(prog="molehill merge")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="adapter directory")
    parser.add_argument("destination", metavar="DST", type=Path, help="a directory to write")
    parser.add_argument(
        "--model", metavar="BASE", help="base model to check against: a directory or cached name"
    )
    parser.add_argument(
        "--into-base",
        action="store_true",
        help="write the base model of --model with the adapter merged into its weights "
        "(default: write the adapter as a plain PEFT LoRA)",
    )
    TOLERANCE.add_to(parser, 0.0)
    LAYOUT.add_to(parser)
    RESIDUAL.add_to(parser, False)
    JSON.add_to(parser, False)


def run(args: argparse.Namespace) -> int:
    """0 once it is written, 1 if the adapter cannot be read or merged, 2 for other mistakes."""
    if args.into_base and not args.model:
        print("molehill merge: --into-base needs --model BASE", file=sys.stderr)
        return USER_ERROR
    try:
        check_free(args.destination)
        print_report(merge(args), as_json=args.json)
    except AdapterError as error:
        return convert.unreadable(error, as_json=args.json)
    except (ImportError, OSError, ValueError) as error:
        print(f"molehill merge: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Writes what was asked for; raises AdapterError, and for the model what
    `base_model` does."""
    base = base_model(args.model) if args.model else None
    adapter = convert.read(args.source, args.lora_b_layout, base, args.base_is_residual)
    if base is not None:
        validate(adapter, base, DEFAULT_LIMITS)
    merged, sites = merge_static(adapter, base, args.merge_tolerance)
    destination = args.destination.absolute()
    result = report(adapter, sites)
    if args.into_base:
        result["weights_changed"] = merge_checkpoint(directory_of(args.model), merged, destination)
    else:
        write_lora(merged, destination)
    if args.model and any(site.error for site in sites):
        result["logit_change"] = probe_prompts.logit_change(args.model, adapter, merged).as_json()
    return result


def report(adapter: Adapter, merges: tuple[SiteMerge, ...]) -> dict[str, Any]:
    """What was merged, as plain JSON. error: see `static_gates.deviation`."""
    return {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "sites": adapter.num_sites,
        "merged": [
            {
                "site": merge.site,
                "reason": merge.reason,
                "rank_before": merge.rank_before,
                "rank_after": merge.rank_after,
                "error": merge.error,
            }
            for merge in merges
        ],
        "problems": [],
    }


def print_report(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    merged = result["merged"]
    for name in ("kind", "digest", "sites"):
        print(f"{name:8}{result[name]}")
    before, after = (sum(site[key] for site in merged) for key in ("rank_before", "rank_after"))
    print(f"merged  {len(merged)} sites, {before} rank rows to {after}")
    worst = max((site["error"] for site in merged), default=0.0)
    if worst:
        print(f"error   at most {worst:.3g} of a site's mean expert: this is an approximation")
    if "logit_change" in result:
        print(f"logits  {probe_prompts.LogitChange(**result['logit_change'])}")
    if "weights_changed" in result:
        largest = max(result["weights_changed"].values(), default=0.0)
        print(f"weights {len(result['weights_changed'])} changed, by at most {100 * largest:.3g} %")
