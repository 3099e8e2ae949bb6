"""Starts vLLM's own server with molehill's worker and routes in place."""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import Any

from molehill.api.adapters.merged_base import MergedBaseAdapter
from molehill.api.adapters.store_lock import check_free
from molehill.api.vllm import compat, extra_vocabulary, precision
from molehill.api.vllm.options import Options, api_keys
from molehill.api.vllm.routed_experts_option import take_over
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.system.ending import end_with_status
from molehill.engine.system.torchvision import check_importable
from molehill.engine.vllm.compilation import WORKER
from molehill.engine.vllm.settings import Settings

PLUGIN = "molehill"
# Of entry points, by which vLLM finds what every process loads, and our routes.
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")

# Engine slots are bookkeeping: an adapter's memory is taken when it loads, not per slot.
MAX_LORAS = 32

# Bytes. vLLM's default on CPU, 92 % of the machine's memory, fails wherever anything else runs.
CPU_KV_CACHE = 4 << 30

# What vLLM is given where the user has not said otherwise. Samples of one request: each takes the
# KV cache of a request, and vLLM's own bound, 16384, lets one client take all of it.
# The interval of a warning about "no available shared memory broadcast block", seconds: all that it
# means while the model is compiled is that the engine core waits for a worker, which says itself
# what it does.
ENVIRONMENT = {"VLLM_MAX_N_SEQUENCES": "128", "VLLM_RINGBUFFER_WARNING_INTERVAL": "600"}

# Bytes of a path, below which there are sockets: Linux takes 107.
MOST_TEMPORARY = 80

# The settings under which vLLM would serve something else than the model that a client names, or
# load adapters past the registry.
UNSAFE_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "opens vLLM's own adapter loading; use --adapter-root",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "lets the base model answer for unknown model names",
    "VLLM_USE_RUST_FRONTEND": "replaces the API server that molehill extends",
}


class LaunchError(ValueError):
    """A combination of options or settings that molehill does not serve."""


def launch(options: Options, vllm_arguments: Sequence[str]) -> None:
    """Serves until stopped.

    Raises LaunchError, LockedError, and for a start adapter AdapterError or RequestError.
    """
    for name, why in UNSAFE_ENVIRONMENT.items():
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise LaunchError(f"{name} is set, which {why}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.trainer_control:
        # vLLM offers them to developers; `Guard` lets through no other of those.
        os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")
    check_installed()
    os.environ["VLLM_PLUGINS"] = allow_plugin(os.environ.get("VLLM_PLUGINS"))

    from molehill.engine.vllm import compilation

    try:
        compat.check_version()
        check_importable()
        compilation.allow_compilation()
        args = parse(vllm_arguments)
        precision.choose_dtype(args)
        compat.check_launcher()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise LaunchError(str(error)) from error
    run(prepare(args, options))


def check_installed() -> None:
    """Raises LaunchError where vLLM would not find molehill's plugins, and so serve without its
    routes: a package that lies on the path, but was not installed there."""
    for group in GROUPS:
        if PLUGIN not in entry_points(group=group).names:
            raise LaunchError(
                f"found no entry point {PLUGIN!r} in {group!r}, expected molehill to be installed "
                "by pip in this environment: its files alone are not enough"
            )


def allow_plugin(allowed: str | None) -> str:
    """Value of VLLM_PLUGINS that adds molehill's plugins to those that would load anyway.

    Unset, vLLM loads all plugins but those that add routes, which it wants named.
    """
    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
    else:
        names = [
            entry.name
            for distribution in distributions()
            for entry in distribution.entry_points
            if entry.group.startswith("vllm.") and entry.group != "vllm.endpoint_plugins"
            if entry.name != PLUGIN
        ]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses vLLM's options, with the defaults that molehill needs."""
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compat.set_up_environment()
    parser = FlexibleArgumentParser(prog="molehill")
    commands = parser.add_subparsers(dest="subparser")
    serve = compat.make_parser(commands.add_parser("serve", prog="molehill serve"))
    serve.set_defaults(worker_cls=WORKER, enable_lora=True, max_lora_rank=8, max_loras=MAX_LORAS)
    args: argparse.Namespace = parser.parse_args(["serve", *arguments])
    if args.model_tag is not None:
        args.model = args.model_tag
    elif args.model == serve.get_default("model"):
        raise LaunchError("no MODEL given")
    chosen = args.kv_cache_memory_bytes or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    share_is_default = args.gpu_memory_utilization == serve.get_default("gpu_memory_utilization")
    if current_platform.is_cpu() and not chosen and share_is_default:
        args.kv_cache_memory_bytes = CPU_KV_CACHE
    configure_logging_from_args(args)
    compat.validate_arguments(args)
    return args


def prepare(args: argparse.Namespace, options: Options) -> argparse.Namespace:
    """Refuses what molehill cannot serve, and puts `options` where the plugin finds them. Raises
    LaunchError, LockedError, and of what is merged into the base AdapterError."""
    check_served(args, options)
    if options.watch and not options.roots:
        raise LaunchError("--watch-adapter-roots: found no --adapter-root, expected one to watch")
    options = replace(options, adapters=start_adapters(args, options))
    args.lora_modules = None
    if not has_processes(args):
        args.api_server_count = None
    hide_directory(args)
    if not args.headless:
        # Again when the store is opened; but this is before anything is written there.
        check_free(options.store)
    if options.merge_into_base is not None:
        options = replace(options, merged_base=_merged_base(options.merge_into_base, args, options))
    if take_over(args):
        if has_processes(args):
            why = "the process that is asked would have to ask the workers, and one of them does"
            raise LaunchError(f"--enable-return-routed-experts with --api-server-count: {why}")
        if options.merge_tolerance:
            why = "found --merge-tolerance, which merges routers away, expected none"
            raise LaunchError(f"--enable-return-routed-experts: {why}")
        options = replace(options, routed_experts=True)
    _make_room(args, options.extra_vocab)
    keys = api_keys(args.api_key)
    # Who may change the server may also ask it; vLLM's own check stands before ours.
    args.api_key = [*keys, *options.admin_keys] if keys else None
    config = settings_of(options).to_config()
    args.additional_config = {**(args.additional_config or {}), **config}
    args.molehill = options
    return args


def check_served(args: argparse.Namespace, options: Options) -> None:
    """Raises LaunchError for options of vLLM's that molehill, or molehill with `options`, does not
    serve."""
    for refused, why in (
        (args.worker_cls != WORKER, "--worker-cls: molehill brings its own worker"),
        (not args.enable_lora, "--no-enable-lora: adapters need it"),
        *process_refusals(args),
        (args.grpc, "--grpc: molehill serves over HTTP"),
        *parallel_refusals(args),
        *(xlora_refusals(args, options) if options.xlora else []),
        (args.default_mm_loras, "--default-mm-loras"),
    ):
        if refused:
            raise LaunchError(f"cannot be used with molehill serve: {why}")


def has_processes(args: argparse.Namespace) -> bool:
    """Whether several answer clients."""
    return (args.api_server_count or 1) > 1


def process_refusals(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Of several processes that answer clients."""
    count = args.api_server_count
    several = has_processes(args)
    return [
        (count is not None and count < 1, f"--api-server-count {count}: expected at least 1"),
        (several and args.headless, "--api-server-count with --headless: it answers no clients"),
        (
            several and args.enable_server_load_tracking,
            "--enable-server-load-tracking with --api-server-count: /load would tell the requests "
            "of one process",
        ),
        (
            several and len(os.fsencode(tempfile.gettempdir())) > MOST_TEMPORARY,
            f"--api-server-count with a TMPDIR of more than {MOST_TEMPORARY} bytes, for a socket's "
            "path takes few more",
        ),
    ]


def start_adapters(args: argparse.Namespace, options: Options) -> tuple[tuple[str, Path], ...]:
    """Names and directories of what is loaded at start, vLLM's --lora-modules too.

    Raises LaunchError for a name that is there twice, or that another option has and none of these.
    """
    modules = [module_path(module) for module in args.lora_modules or ()]
    adapters = (*options.adapters, *modules)
    names = Counter(name for name, _ in adapters)
    for name, count in names.items():
        if count > 1:
            raise LaunchError(f"--adapter {name}: the name is given twice")
    for option, named in (
        ("--adapter-lora-b-layout", {name: f"{name}={layout}" for name, layout in options.layouts}),
        ("--adapter-base-is-residual", {name: name for name in options.residuals}),
        (
            "--adapter-non-granular-after",
            {name: f"{name}={tokens}" for name, tokens in options.non_granular},
        ),
    ):
        for name, given in named.items():
            if name not in names:
                raise LaunchError(f"{option}: found {given}, expected an --adapter's name")
    return adapters


def hide_directory(args: argparse.Namespace) -> None:
    """Of a model without a name: clients need not know where it lies; those that do may go on using
    the path."""
    if args.served_model_name is None and Path(args.model).is_dir():
        names = (Path(args.model).resolve().name, args.model)
        args.served_model_name = list(dict.fromkeys(names))


def settings_of(options: Options) -> Settings:
    """What the workers are told."""
    merged_base = options.merged_base
    return Settings(
        options.backend,
        options.memory,
        options.limits,
        options.merge,
        options.merge_tolerance,
        None if merged_base is None else str(merged_base.directory),
        "" if merged_base is None else merged_base.digest,
        options.host_memory,
        options.capture_routing,
        options.xlora,
        options.extra_vocab,
    )


def parallel_refusals(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Of data parallelism: a server loads adapters into every engine, and must see it die."""
    size = args.data_parallel_size
    outside = "one API server must know all engines; start a server for each replica"
    elsewhere = "it would not be seen when an engine on another machine is lost"
    return [
        (args.data_parallel_external_lb, f"--data-parallel-external-lb: {outside}"),
        (args.data_parallel_hybrid_lb, f"--data-parallel-hybrid-lb: {outside}"),
        (
            args.data_parallel_multi_port_external_lb,
            f"--data-parallel-multi-port-external-lb: {outside}",
        ),
        (args.data_parallel_rank is not None, f"--data-parallel-rank: {outside}"),
        (args.data_parallel_start_rank is not None, f"--data-parallel-start-rank: {outside}"),
        (
            args.data_parallel_size_local not in (None, size),
            f"--data-parallel-size-local other than --data-parallel-size: {elsewhere}",
        ),
        (size > 1 and args.headless, f"--headless with --data-parallel-size: {elsewhere}"),
        (
            size > 1 and args.data_parallel_backend != "mp",
            f"--data-parallel-backend {args.data_parallel_backend}: {elsewhere}",
        ),
    ]


def xlora_refusals(args: argparse.Namespace, options: Options) -> list[tuple[bool, str]]:
    """Of what shows before there is an engine; `engine.vllm.scaling_pass` refuses the rest."""
    one = "X-LoRA runs its two passes on one worker"
    merged = "X-LoRA's classifier reads what the base itself makes"
    return [
        (args.tensor_parallel_size > 1, f"--tensor-parallel-size with --xlora: {one}"),
        (args.pipeline_parallel_size > 1, f"--pipeline-parallel-size with --xlora: {one}"),
        (args.data_parallel_size > 1, f"--data-parallel-size with --xlora: {one}"),
        (options.merge_into_base is not None, f"--merge-into-base with --xlora: {merged}"),
    ]


def _merged_base(name: str, args: argparse.Namespace, options: Options) -> MergedBaseAdapter:
    # Transformers: only who merges need wait for it.
    from molehill.api.vllm.merged_base import write_merged_base

    try:
        return write_merged_base(name, args, options)
    except AdapterError:
        raise
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _make_room(args: argparse.Namespace, extra_tokens: int) -> None:
    try:
        extra_vocabulary.make_room(args, extra_tokens)
    except ValueError as error:
        raise LaunchError(str(error)) from error


def module_path(module: Any) -> tuple[str, Path]:
    """An entry of vLLM's --lora-modules as an adapter to load at start."""
    path = Path(module.path).expanduser()
    if not path.is_dir():
        raise LaunchError(f"--lora-modules {module.name}: found no directory at {module.path!r}")
    return module.name, path


def run(args: argparse.Namespace) -> None:
    import uvloop
    from vllm.entrypoints.cli.serve import run_headless

    if args.headless:
        args.api_server_count = 0
        run_headless(args)
    elif has_processes(args):
        from molehill.api.vllm import api_processes

        try:
            api_processes.run_processes(args)
        except api_processes.RefusedStartError as error:
            raise LaunchError(str(error)) from error
    else:
        # vLLM's app, which is heavy to import, has no part in what these do before it.
        from molehill.api.vllm import starting

        status = 1
        try:
            uvloop.run(starting.run_server(args))
            status = 0
        finally:
            end_with_status(status)
