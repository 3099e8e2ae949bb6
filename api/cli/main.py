"""The `molehill` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from molehill.api import options
from molehill.api.adapters.errors import RequestError
from molehill.api.adapters.store_lock import LockedError
from molehill.api.sources.manifest import ManifestError
from molehill.engine.adapter.errors import AdapterError

USER_ERROR = 2

# As shells report a process that SIGINT ended.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit code: 2 for what the user can put right."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except MemoryError as error:
        print(f"molehill: found no memory for it, expected some: {error}", file=sys.stderr)
        return USER_ERROR


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    if arguments[:1] == ["inspect"]:
        return inspect(arguments[1:])
    if arguments[:1] == ["convert"]:
        return convert(arguments[1:])
    if arguments[:1] == ["merge"]:
        return merge(arguments[1:])
    if arguments[:1] == ["env"]:
        return env(arguments[1:])
    top_parser().parse_args(arguments)
    return 0


def top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="molehill", description="Serve mixtures of LoRA experts on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"molehill {version('molehill')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("serve", help="start the server")
    commands.add_parser("inspect", help="show what an adapter holds, and what is wrong with it")
    commands.add_parser("convert", help="write an adapter in molehill's own format")
    commands.add_parser("merge", help="write a static adapter as a plain LoRA or merged base model")
    commands.add_parser("env", help="show versions, and which backend applies adapters here")
    return parser


def inspect(arguments: Sequence[str]) -> int:
    """`molehill inspect`."""
    # Imports torch, which other commands need not wait for.
    from molehill.api.cli import inspect as command

    parser = argparse.ArgumentParser(prog="molehill inspect")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def convert(arguments: Sequence[str]) -> int:
    """`molehill convert`."""
    # Imports torch, which other commands need not wait for.
    from molehill.api.cli import convert as command

    parser = argparse.ArgumentParser(prog="molehill convert")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def merge(arguments: Sequence[str]) -> int:
    """`molehill merge`."""
    # Imports torch, which other commands need not wait for.
    from molehill.api.cli import merge as command

    parser = argparse.ArgumentParser(prog="molehill merge")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def env(arguments: Sequence[str]) -> int:
    """`molehill env`."""
    # Imports torch and vLLM, which other commands need not wait for.
    from molehill.api.cli import env as command

    parser = argparse.ArgumentParser(prog="molehill env")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def serve_parser() -> argparse.ArgumentParser:
    """Knows molehill's options only, so that help and errors need no import of vLLM."""
    parser = argparse.ArgumentParser(
        prog="molehill serve",
        usage="molehill serve MODEL [options] [any option of vllm serve]",
        description="Serve MODEL and its adapters over the OpenAI protocol.",
        epilog="All other options are vLLM's: molehill serve --help=all lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    options.add_arguments(parser)
    return parser


def serve(arguments: Sequence[str]) -> int:
    """`molehill serve`: splits our options from vLLM's, then hands over to the launcher."""
    parser = serve_parser()
    if "--help" in arguments or "-h" in arguments:
        parser.print_help()
        return 0
    ours, vllm_arguments = parser.parse_known_args(arguments)

    # A heavy import, and vLLM reads the environment that the launcher prepares.
    from molehill.api.vllm import launcher

    try:
        launcher.launch(options.from_namespace(ours), vllm_arguments)
    except (launcher.LaunchError, AdapterError, RequestError, ManifestError, LockedError) as error:
        print(f"molehill serve: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
