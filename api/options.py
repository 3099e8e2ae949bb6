"""molehill's own options of `molehill serve`; all others are vLLM's."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from molehill.api import names
from molehill.api.errors import BadNameError
from molehill.engine.base import Limits
from molehill.engine.vllm.settings import Settings

MEMORY = Settings.memory


@dataclass(frozen=True)
class Options:
    """What the API side needs to know. The defaults hold where no launcher of ours ran.

    adapters: (name, directory) of the adapters to load at start, wherever they lie.
    roots: directories that clients may load adapters from; without any, they may load none.
    store: where canonical copies go, readable on every node; None is a temporary directory.
    backend, memory, limits: for the workers, see `molehill.engine.vllm.settings`.
    """

    adapters: tuple[tuple[str, Path], ...] = ()
    roots: tuple[Path, ...] = ()
    store: Path | None = None
    backend: str = "auto"
    memory: int = MEMORY
    limits: Limits = field(default_factory=Limits)


def named_path(text: str) -> tuple[str, Path]:
    """`NAME=PATH` of an existing directory; raises argparse.ArgumentTypeError."""
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=PATH")
    try:
        names.check(name, base_models=())
    except BadNameError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, existing_directory(path)


def existing_directory(text: str) -> Path:
    """Raises argparse.ArgumentTypeError where there is none."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"found no directory at {text!r}")
    return path


def positive(text: str) -> int:
    """A whole number above 0; raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--adapter",
        metavar="NAME=PATH",
        action="append",
        default=[],
        type=named_path,
        help="load an adapter at start and serve it as model NAME; may be repeated",
    )
    group.add_argument(
        "--adapter-root",
        metavar="DIR",
        action="append",
        default=[],
        type=existing_directory,
        help="let clients load adapters from below DIR; may be repeated (default: none)",
    )
    group.add_argument(
        "--adapter-store",
        metavar="DIR",
        type=Path,
        help="keep the canonical copies of loaded adapters in DIR, which belongs to this server "
        "alone and which every node must see (default: a temporary directory)",
    )
    group.add_argument(
        "--adapter-backend",
        metavar="NAME",
        default="auto",
        help="kernels that apply adapters (default: auto, the fastest that run here)",
    )
    group.add_argument(
        "--adapter-memory",
        metavar="BYTES",
        default=MEMORY,
        type=positive,
        help=f"for the serving copies of all adapters on one worker (default: {MEMORY})",
    )
    bounds = parser.add_argument_group("limits of one adapter")
    for flag, default, what in (
        ("--max-adapter-rank", limits.rank, "rank of one expert"),
        ("--max-adapter-experts", limits.experts, "experts of one site"),
        ("--max-adapter-total-rank", limits.total_rank, "ranks of one site's experts, summed"),
        ("--max-adapter-bytes", limits.adapter_bytes, "bytes of all tensors in float32"),
    ):
        bounds.add_argument(
            flag, metavar="N", type=positive, default=default, help=f"{what} (default: {default})"
        )


def from_namespace(args: argparse.Namespace) -> Options:
    limits = Limits(
        rank=args.max_adapter_rank,
        experts=args.max_adapter_experts,
        total_rank=args.max_adapter_total_rank,
        adapter_bytes=args.max_adapter_bytes,
    )
    return Options(
        adapters=tuple(args.adapter),
        roots=tuple(args.adapter_root),
        store=args.adapter_store,
        backend=args.adapter_backend,
        memory=args.adapter_memory,
        limits=limits,
    )
