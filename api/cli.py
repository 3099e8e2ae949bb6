"""The `molehill` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from molehill.api import options

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit code: 2 for what the user can put right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    args = _parser().parse_args(arguments)
    if args.command == "inspect":
        from molehill.api import inspect

        return inspect.run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="molehill", description="Serve mixtures of LoRA experts on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"molehill {version('molehill')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("serve", help="start the server", add_help=False)
    from molehill.api import inspect

    inspect.add_arguments(commands.add_parser("inspect", help="show what an adapter holds"))
    return parser


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
    from molehill.api import launcher

    try:
        launcher.launch(options.from_namespace(ours), vllm_arguments)
    except (launcher.LaunchError, launcher.AdapterError) as error:
        print(f"molehill serve: {error}", file=sys.stderr)
        return USER_ERROR
    return 0
