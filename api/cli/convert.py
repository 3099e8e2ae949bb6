"""`molehill convert`: an adapter of any readable format into molehill's own."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molehill.api.cli.arguments import JSON, LAYOUT, RESIDUAL, amount
from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.base_weights import directory_of
from molehill.engine.adapter.errors import AdapterError, UnsupportedError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check
from molehill.engine.formats import native
from molehill.engine.formats.convert import goat_base, isolation, original_base
from molehill.engine.formats.io import files
from molehill.engine.formats.readers import changed_base, goat, invocation, non_granular
from molehill.engine.hf.checkpoint import linear_weights
from molehill.engine.hf.shapes import base_model
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
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model that training began with, a directory or cached name: an adapter that "
        "took a part of its weights out of them (PiSSA, OLoRA, GOAT) gets it back, and one that "
        "leaves out widths (VeRA, MiSS) is read by its",
    )
    parser.add_argument(
        "--initial",
        metavar="DIR",
        type=Path,
        help="the adapter as it was before training: one that took it out of the base weights "
        "(CorDA and LoRA-GA too) gets it back",
    )
    LAYOUT.add_to(parser)
    RESIDUAL.add_to(parser, False)
    parser.add_argument(
        "--task",
        metavar="N",
        type=amount,
        help="of an adapter whose experts are mixed by task (MOELoRA): the task to make a copy for",
    )
    parser.add_argument(
        non_granular.OPTION,
        metavar="K",
        type=amount,
        help="of an X-LoRA: only the first K tokens of an answer get scalings of their own, later "
        "ones keep the last; faster, and another answer than PEFT's",
    )
    JSON.add_to(parser, False)


def run(args: argparse.Namespace) -> int:
    """0 once it is written, 1 if SRC cannot be read, 2 if DST cannot be written or a base read."""
    try:
        check_free(args.destination)
        adapter = non_granular.with_given(converted(args), args.non_granular_after)
        native.write(adapter, args.destination.absolute())
    except AdapterError as error:
        return unreadable(error, as_json=args.json)
    except (ImportError, OSError, ValueError) as error:
        print(f"molehill convert: {error}", file=sys.stderr)
        return USER_ERROR
    result = report(adapter)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0


def converted(args: argparse.Namespace) -> Adapter:
    """The adapter, with what was taken out of the base weights back in it where that is asked for.

    Raises AdapterError, and for the model what `base_model` does."""
    base = base_model(args.base) if args.base else None
    config = files.read_config(args.source) if (args.source / files.CONFIG).is_file() else None
    of_goat = config is not None and goat.changes_base(config)
    changed = of_goat or (config is not None and changed_base.changes_base(config))
    back = changed and not args.base_is_residual and (args.base or args.initial)
    residual = args.base_is_residual or bool(back)
    adapter = read(args.source, args.lora_b_layout, base, residual, args.task)
    if not back or config is None:
        return adapter
    if adapter.invocation_tokens:
        raise UnsupportedError(
            invocation.FIELD,
            "an activated adapter, which needs the changed base up to its invocation",
            "--base-is-residual, with that base served",
        )
    if of_goat:
        if args.base is None:
            expected = "--base MODEL: what GOAT began with is computed from the base weights"
            raise UnsupportedError("--initial", args.initial, expected)
        weights = linear_weights(directory_of(args.base), adapter.sites)
        result = goat_base.with_base(adapter, config, weights)
    elif args.initial is None:
        weights = linear_weights(directory_of(args.base), adapter.sites)
        result = original_base.from_base(adapter, config, weights)
    else:
        initial = files.read_config(args.initial)
        beside = changed_base.changes_base(initial)
        result = original_base.from_initial(adapter, read(args.initial, base_is_residual=beside))
    check(result, formats.DEFAULT_LIMITS)
    return result


def read(
    source: Path,
    lora_b_layout: Layout | None = None,
    base: BaseModel | None = None,
    base_is_residual: bool = False,
    task: int | None = None,
) -> Adapter:
    """Any format; a process of its own reads pickles. Raises an AdapterError."""
    reader = isolation.read_isolated if isolation.is_pickled(source) else formats.read
    return reader(
        source,
        lora_b_layout=lora_b_layout,
        base=base,
        base_is_residual=base_is_residual,
        task=task,
    )


def report(adapter: Adapter) -> dict[str, Any]:
    """What was written, as plain JSON. bytes: of all tensors."""
    return {
        "kind": adapter.kind,
        "digest": adapter.digest,
        "sites": adapter.num_sites,
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


def _print(result: dict[str, Any]) -> None:
    for name in ("kind", "digest", "sites", "bytes"):
        print(f"{name:8}{result[name]}")
    for warning in result["warnings"]:
        print(f"warning {warning}")
