"""What the commands' options are made of: one definition each, and how values are read."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from molehill.api.adapters import names
from molehill.api.adapters.errors import BadNameError
from molehill.api.sources.urls import URL_SCHEMES
from molehill.engine.adapter.layout import LAYOUTS, Layout


@dataclass(frozen=True)
class Option:
    """name: of what it sets. how: argparse's keywords, but for the default. help: as argparse takes
    it, with %(default)s."""

    name: str
    flag: str
    help: str
    how: Mapping[str, Any] = field(default_factory=dict)

    def add_to(self, parser: argparse._ActionsContainer, default: Any = None) -> None:
        # Argparse appends to a list of its own.
        default = list(default) if isinstance(default, tuple) else default
        parser.add_argument(self.flag, dest=self.name, default=default, help=self.help, **self.how)


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


def named_layout(text: str) -> tuple[str, Layout]:
    """`NAME=LAYOUT`; raises argparse.ArgumentTypeError."""
    name, _, given = text.rpartition("=")
    for layout in LAYOUTS:
        if name and given == layout:
            return name, layout
    expected = f"NAME= and one of {', '.join(LAYOUTS)}"
    raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")


def named_amount(text: str) -> tuple[str, int]:
    """`NAME=K`; raises argparse.ArgumentTypeError."""
    name, _, given = text.rpartition("=")
    if not name or not given.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME= and a whole number")
    return name, int(given)


def existing_directory(text: str) -> Path:
    """Raises argparse.ArgumentTypeError where there is none."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"found no directory at {text!r}")
    return path


def url_prefix(text: str) -> str:
    """Raises argparse.ArgumentTypeError for a URL that nothing can lie below."""
    parts = urlsplit(text)
    if parts.scheme not in URL_SCHEMES or not parts.netloc or parts.query or parts.fragment:
        schemes = ", ".join(URL_SCHEMES)
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a URL of one of {schemes}")
    return text


def path_or_url(text: str) -> str:
    """Of one file, which need not be there yet; raises argparse.ArgumentTypeError."""
    if "://" not in text:
        if not text:
            raise argparse.ArgumentTypeError("found nothing, expected a path or a URL")
        return str(Path(text).expanduser())
    parts = urlsplit(text)
    if parts.scheme not in URL_SCHEMES or not parts.netloc:
        # A signed URL is a secret.
        schemes = ", ".join(URL_SCHEMES)
        raise argparse.ArgumentTypeError(f"found a URL of {parts.scheme!r}, expected {schemes}")
    return text


def secret(text: str) -> str:
    """A key; raises argparse.ArgumentTypeError for an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found an empty key")
    return text


def positive(text: str) -> int:
    """A whole number above 0; raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def amount(text: str) -> int:
    """A whole number; raises argparse.ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number")
    return int(text)


def fraction(text: str) -> float:
    """A number of at least 0; raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least 0")
    return value


# Of every command that merges.
TOLERANCE = Option(
    "merge_tolerance",
    "--merge-tolerance",
    "also merge experts whose low-rank products are within T of their mean, relative, in the "
    "Frobenius norm; an approximation (default: 0, exact merging only)",
    {"metavar": "T", "type": fraction},
)

# Of every command that reads one adapter.
LAYOUT = Option(
    "lora_b_layout",
    "--lora-b-layout",
    "whose the columns of lora_B are, of LoRA on fused experts whose adapter_config.json does not "
    "say it: rank_major as PEFT has them, grouped_by_expert as Unsloth had them until "
    "September 2026",
    {"choices": LAYOUTS},
)

RESIDUAL = Option(
    "base_is_residual",
    "--base-is-residual",
    "the base model is the one that the adapter was trained beside: the residual that PiSSA, OLoRA "
    "or CorDA left of another, or LoftQ's quantised one",
    {"action": "store_true"},
)

JSON = Option("json", "--json", "machine-readable output", {"action": "store_true"})
