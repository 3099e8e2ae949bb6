"""`molehill env`: what is installed and which backend applies adapters here, and why.

`--build` first compiles the C++ kernels, so that no server does at its first start.
"""

import argparse
import logging
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from molehill.api.vllm import compat
from molehill.engine.vllm import backends
from molehill.engine.vllm.compat import installed_version
from molehill.kernels.cpu import build


def facts() -> dict[str, str]:
    """What a bug report should say, by name."""
    cuda = torch.cuda.is_available()
    return {
        "molehill": version("molehill"),
        "vLLM": vllm(),
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "GPU": torch.cuda.get_device_name() if cuda else "none",
        "backend": backend(cuda),
    }


def backend(cuda: bool) -> str:
    """What `--adapter-backend auto` takes here."""
    if cuda:
        return "triton: a GPU is here"
    chosen, why = backends.on_cpu("auto")
    return f"{chosen.name}: {why}"


def vllm() -> str:
    """The installed version, or what is wrong with it."""
    try:
        compat.check_version()
        return installed_version()
    except RuntimeError as error:
        return str(error)


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see `run`."""
    parser = argparse.ArgumentParser(prog="molehill env")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="store_true",
        help="compile the C++ kernels now, where a compiler is there, not at the first start",
    )


def run(args: argparse.Namespace) -> int:
    """1 if the kernels were to be compiled and could not be, for another reason than that there is
    no compiler: then torch serves."""
    if args.build and not build_kernels():
        return 1
    table = Table(show_header=False, box=None)
    for name, fact in facts().items():
        table.add_row(name, fact)
    Console().print(table)
    return 0


def build_kernels() -> bool:
    """Whether `backend` will find the library, or does without; tells on stderr what it does."""
    handler = logging.StreamHandler(sys.stderr)
    build.logger.addHandler(handler)
    build.logger.setLevel(logging.INFO)
    build.logger.propagate = False
    try:
        build.logger.info("molehill: the C++ kernels are in %s", build.install().path)
    except build.NoCompilerError as error:
        build.logger.info("molehill: the C++ kernels are not built: %s", error)
    except build.BuildError as error:
        build.logger.error("molehill: %s", error)
        return False
    finally:
        build.logger.removeHandler(handler)
        build.logger.propagate = True
    return True
