"""molehill's own options of `molehill serve`; all others are vLLM's."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from molehill.api.adapters import names
from molehill.api.adapters.admission import Admission
from molehill.api.adapters.errors import BadNameError
from molehill.api.sources.urls import URL_SCHEMES
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.layout import LAYOUTS, Layout
from molehill.engine.vllm.settings import Settings

MEMORY = Settings.memory
HOST_MEMORY = Settings.host_memory

# Command lines can be seen by every user of a machine, environments cannot.
ADMIN_KEY_VARIABLE = "MOLEHILL_ADMIN_API_KEY"


@dataclass(frozen=True)
class MergedBaseAdapter:
    """The adapter whose static part is in the base weights.

    digest: of the adapter as it was read. directory: of its merged copy, in the native format.
    """

    name: str
    digest: str
    directory: Path


@dataclass(frozen=True)
class Options:
    """What the API side needs to know. The defaults hold where no launcher of ours ran.

    adapters: (name, directory) of the adapters to load at start, wherever they lie.
    layouts: of lora_B on the fused experts of those whose files do not say it, by name.
    roots: directories that clients may load adapters from; without any, they may load none.
    store: where canonical copies go, readable on every node; None is a temporary directory.
    backend, memory, host_memory, limits: for the workers, see `molehill.engine.vllm.settings`.
    merge: whether static parts of adapters become one low-rank pair as they load.
    merge_tolerance: above 0, nearly equal experts do too, see `static_gates.gate`.
    merge_into_base: the start adapter whose static part goes into the base weights.
    merged_base: what the launcher made of that adapter.
    admission: bounds on all adapters together. hub, url_prefixes: what else may be loaded from.
    watch: whether what appears in a root is served. probe: whether an adapter without effect is
    refused. admin_keys: for all that changes the server.
    """

    adapters: tuple[tuple[str, Path], ...] = ()
    layouts: tuple[tuple[str, Layout], ...] = ()
    roots: tuple[Path, ...] = ()
    store: Path | None = None
    backend: str = "auto"
    memory: int = MEMORY
    host_memory: int = HOST_MEMORY
    limits: Limits = field(default_factory=Limits)
    merge: bool = True
    merge_tolerance: float = 0.0
    merge_into_base: str | None = None
    merged_base: MergedBaseAdapter | None = None
    admission: Admission = field(default_factory=Admission)
    hub: bool = False
    url_prefixes: tuple[str, ...] = ()
    watch: bool = False
    probe: bool = True
    admin_keys: tuple[str, ...] = field(default=(), repr=False)


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
    name, _, found = text.rpartition("=")
    for layout in LAYOUTS:
        if name and found == layout:
            return name, layout
    expected = f"NAME= and one of {', '.join(LAYOUTS)}"
    raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")


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


def add_tolerance(parser: argparse._ActionsContainer) -> None:
    """The option of every command that merges."""
    parser.add_argument(
        "--merge-tolerance",
        metavar="T",
        type=fraction,
        default=0.0,
        help="also merge experts whose low-rank products are within T of their mean, relative, in "
        "the Frobenius norm; an approximation (default: 0, exact merging only)",
    )


def add_layout(parser: argparse._ActionsContainer) -> None:
    """The option of every command that reads one adapter."""
    parser.add_argument(
        "--lora-b-layout",
        choices=LAYOUTS,
        help="whose the columns of lora_B are, of LoRA on fused experts whose adapter_config.json "
        "does not say it: rank_major as PEFT has them, grouped_by_expert as Unsloth had them until "
        "September 2026",
    )


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
        "--adapter-lora-b-layout",
        metavar="NAME=LAYOUT",
        action="append",
        default=[],
        type=named_layout,
        help="how to read the LoRA on fused experts of --adapter NAME: one of "
        f"{', '.join(LAYOUTS)}; may be repeated (default: as its adapter_config.json says)",
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
    group.add_argument(
        "--adapter-host-memory",
        metavar="BYTES",
        default=HOST_MEMORY,
        type=amount,
        help="for adapters that had to leave a worker and may come back, on its host; 0 for none "
        f"(default: {HOST_MEMORY})",
    )
    merging = parser.add_argument_group("merging")
    merging.add_argument(
        "--no-merge",
        dest="merge",
        action="store_false",
        help="serve static parts of adapters as they are (default: as one low-rank pair)",
    )
    add_tolerance(merging)
    merging.add_argument(
        "--merge-into-base",
        metavar="NAME",
        help="put the static part of the start adapter NAME into the base weights; all other "
        "requests subtract it again",
    )
    add_source_arguments(parser)
    group.add_argument(
        "--adapter-probe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse an adapter that does not change the answer to a probe prompt (default: on)",
    )
    admission = Admission()
    bounds = parser.add_argument_group("limits of all adapters")
    for flag, default, what in (
        ("--max-adapters", admission.adapters, "names that may be served"),
        ("--max-adapter-loads", admission.loads, "loads at once; others are told to retry (429)"),
    ):
        bounds.add_argument(
            flag, metavar="N", type=positive, default=default, help=f"{what} (default: {default})"
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


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may load adapters, and from where")
    group.add_argument(
        "--admin-api-key",
        metavar="KEY",
        action="append",
        default=[],
        type=secret,
        help="needed for all that changes the server, adapters first of all; may be repeated "
        f"(default: ${ADMIN_KEY_VARIABLE}, else the --api-key)",
    )
    group.add_argument(
        "--allow-hub",
        action="store_true",
        help="let clients load adapters from Hugging Face: hf://OWNER/NAME[@REVISION]",
    )
    group.add_argument(
        "--allow-url-prefix",
        metavar="URL",
        action="append",
        default=[],
        type=url_prefix,
        help="let clients load adapters from below an https, s3 or gs URL, or an http one on a "
        "network that you trust; may be repeated",
    )
    group.add_argument(
        "--adapter-pickles",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take pickled weights (adapter_model.bin) too; they are read as plain tensors only, "
        "but in the server's own process (default: on)",
    )
    group.add_argument(
        "--watch-adapter-roots",
        action="store_true",
        help="serve every finished directory below an --adapter-root under its name",
    )


def secret(text: str) -> str:
    """A key; raises argparse.ArgumentTypeError for an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found an empty key")
    return text


def url_prefix(text: str) -> str:
    """Raises argparse.ArgumentTypeError for a URL that nothing can lie below."""
    parts = urlsplit(text)
    if parts.scheme not in URL_SCHEMES or not parts.netloc or parts.query or parts.fragment:
        schemes = ", ".join(URL_SCHEMES)
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a URL of one of {schemes}")
    return text


def from_namespace(args: argparse.Namespace) -> Options:
    limits = Limits(
        rank=args.max_adapter_rank,
        experts=args.max_adapter_experts,
        total_rank=args.max_adapter_total_rank,
        adapter_bytes=args.max_adapter_bytes,
        pickles=args.adapter_pickles,
    )
    return Options(
        adapters=tuple(args.adapter),
        layouts=tuple(args.adapter_lora_b_layout),
        roots=tuple(args.adapter_root),
        store=args.adapter_store,
        backend=args.adapter_backend,
        memory=args.adapter_memory,
        host_memory=args.adapter_host_memory,
        limits=limits,
        merge=args.merge,
        merge_tolerance=args.merge_tolerance,
        merge_into_base=args.merge_into_base,
        admission=Admission(args.max_adapters, args.max_adapter_loads),
        hub=args.allow_hub,
        url_prefixes=tuple(args.allow_url_prefix),
        watch=args.watch_adapter_roots,
        probe=args.adapter_probe,
        admin_keys=tuple(args.admin_api_key) or admin_keys_of_environment(),
    )


def admin_keys_of_environment() -> tuple[str, ...]:
    key = os.environ.get(ADMIN_KEY_VARIABLE, "")
    return (key,) if key.strip() else ()


def api_keys(args: argparse.Namespace) -> list[str]:
    """vLLM's: those of its command line, else that of the environment."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
