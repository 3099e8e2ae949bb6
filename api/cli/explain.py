"""`molehill explain`: which experts a text's tokens get, as a page to look at."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from molehill.api.cli.routing_sources import SourceError, of_reference, of_server
from molehill.engine.adapter.errors import AdapterError

USER_ERROR = 2
KEY_VARIABLE = "OPENAI_API_KEY"


def main(arguments: Sequence[str]) -> int:
    """Writes the page, or prints JSON; 2 for what the user can put right."""
    args = make_parser().parse_args(arguments)
    try:
        text = text_of(args)
        if args.url is None:
            explained = of_reference(args.model, Path(args.adapter), text, args.max_tokens)
        else:
            key = os.environ.get(KEY_VARIABLE)
            explained = of_server(args.url, key, args.model, args.adapter, text, args.max_tokens)
        if args.json:
            print(json.dumps(explained.to_json()))
            return 0
        args.output.write_text(explained.to_html())
    except (AdapterError, SourceError, OSError) as error:
        print(f"molehill explain: {error}", file=sys.stderr)
        return USER_ERROR
    print(f"{args.output}: {len(explained.tokens)} tokens, {len(explained.sites)} routers")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="molehill explain",
        description="Show which experts a text's tokens get: on one HTML page that needs nothing "
        "else. Without --url by the definition, on Transformers, slowly.",
    )
    parser.add_argument("model", metavar="MODEL", help="base model: a directory or cached name")
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter directory; with --url, the name it serves under"
    )
    parser.add_argument("text", nargs="?", help="prompt")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the prompt")
    parser.add_argument(
        "--url",
        help=f"a molehill server to ask, as http://localhost:8000; its key is ${KEY_VARIABLE}",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=16,
        metavar="N",
        help="greedy tokens to add to the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("routing.html"),
        metavar="FILE",
        help="where the page goes (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print all as JSON instead")
    return parser


def text_of(args: argparse.Namespace) -> str:
    """Raises SourceError, OSError."""
    if (args.text is None) == (args.prompt_file is None):
        raise SourceError("expected a text or --prompt-file, either")
    if args.prompt_file is None:
        return str(args.text)
    try:
        return str(args.prompt_file.read_text())
    except UnicodeDecodeError as error:
        raise SourceError(f"{args.prompt_file}: {error}") from error
