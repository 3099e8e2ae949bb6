"""The `molehill` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

USER_ERROR = 2

# Each is the module beside this one that has its name, or that of MODULES, with `main(arguments)`.
# It is imported when it is asked for: most need torch, some vLLM, which nobody should wait for in
# vain.
COMMANDS = {
    "serve": "start the server",
    "inspect": "show what an adapter holds, and what is wrong with it",
    "convert": "write an adapter in molehill's own format",
    "merge": "write a static adapter as a plain LoRA or merged base model",
    "explain": "show which experts a text's tokens get, on a page",
    "env": "show versions, and which backend applies adapters here",
    "bench": "measure how fast adapters are on this machine, beside the base",
}
# benchmarks/ stands above api, which imports nothing of it.
MODULES = {"bench": "molehill.benchmarks.bench"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit code: 2 for what the user can put right."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except MemoryError as error:
        print(f"molehill: out of memory: {error}", file=sys.stderr)
        return USER_ERROR


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        make_parser().parse_args(arguments)
        return 0
    name = arguments[0]
    command = import_module(MODULES.get(name, f"molehill.api.cli.{name}"))
    code: int = command.main(arguments[1:])
    return code


def make_parser() -> argparse.ArgumentParser:
    """Knows the commands' names only."""
    parser = argparse.ArgumentParser(
        prog="molehill", description="Serve mixtures of LoRA experts on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"molehill {version('molehill')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    return parser
