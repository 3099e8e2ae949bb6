"""`molehill convert`: an adapter of any readable format into molehill's own."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molehill.api.cli.arguments import JSON, LAYOUT, amount
from molehill.engine import formats
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check
from molehill.engine.formats import native
from molehill.engine.formats.convert import goat_base, isolation
from molehill.engine.formats.io import files
from molehill.engine.formats.readers import goat
from molehill.engine.formats.readers.reader import NOTHING_TOLD, Told
from molehill.engine.hf.checkpoint import directory_of, linear_weights
from molehill.engine.system.atomic_directory import check_free

UNREADABLE = 1
USER_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see `run`."""
    parser = argparse.ArgumentParser(prog="molehill convert")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="adapter directory")
    parser.add_argument("destination", metavar="DST", type=Path, help="a directory to write")
    LAYOUT.add_to(parser)
    parser.add_argument(
        "--task",
        metavar="N",
        type=amount,
        help="of an adapter whose experts are mixed by task (MOELoRA): the task to make a copy for",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model that was trained on, a directory or cached name: of an adapter that "
        "begins with a part of the base weights (GOAT), which it then holds itself",
    )
    JSON.add_to(parser, False)


def run(args: argparse.Namespace) -> int:
    """0 once it is written, 1 if SRC cannot be read, 2 if DST cannot be written or a base read."""
    try:
        check_free(args.destination)
        adapter = converted(args)
        native.write(adapter, args.destination.absolute())
    except AdapterError as error:
        return unreadable(error, as_json=args.json)
    except (OSError, ValueError) as error:
        print(f"molehill convert: {error}", file=sys.stderr)
        return USER_ERROR
    found = report(adapter)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def converted(args: argparse.Namespace) -> Adapter:
    """The adapter, with what was taken out of the base weights where that is asked for.

    Raises AdapterError, and OSError or ValueError for the base."""
    config = files.read_config(args.source) if (args.source / files.CONFIG).is_file() else None
    restores = args.base is not None and config is not None and goat.changes_base(config)
    adapter = read(args.source, args.lora_b_layout, Told(args.task, restores))
    if not restores or config is None:
        return adapter
    weights = linear_weights(directory_of(args.base), adapter.sites)
    found = goat_base.with_base(adapter, config, weights)
    check(found, formats.DEFAULT_LIMITS)
    return found


def read(source: Path, lora_b_layout: Layout | None = None, told: Told = NOTHING_TOLD) -> Adapter:
    """Any format; a process of its own reads pickles. Raises an AdapterError."""
    reader = isolation.read_isolated if isolation.is_pickled(source) else formats.read
    return reader(source, lora_b_layout=lora_b_layout, told=told)


def report(adapter: Adapter) -> dict[str, Any]:
    """What was written, as plain JSON. bytes: of all tensors."""
    return {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "sites": len(adapter.sites),
        "bytes": adapter.num_bytes,
        "warnings": list(adapter.warnings),
        "problems": [],
    }


def unreadable(error: AdapterError, *, as_json: bool) -> int:
    if as_json:
        problem = {
            "type": error.kind,
            "where": error.where,
            "found": error.found,
            "expected": error.expected,
        }
        print(json.dumps({"problems": [problem]}, indent=2))
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return UNREADABLE


def _print(found: dict[str, Any]) -> None:
    for name in ("kind", "digest", "sites", "bytes"):
        print(f"{name:8}{found[name]}")
    for warning in found["warnings"]:
        print(f"warning {warning}")
