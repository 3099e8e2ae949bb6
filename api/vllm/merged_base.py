"""Prepares the adapter of `--merge-into-base`, before any engine starts."""

import argparse
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from molehill.api.adapters.merged_base import MergedBaseAdapter
from molehill.api.vllm.options import Options
from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge import check_mergeable, merge_static, mergeable_sites

# vLLM's formats that `molehill.engine.vllm.model.checkpoint_loader` can change weights in.
LOAD_FORMATS = ("auto", "hf", "safetensors")


def write_merged_base(name: str, args: argparse.Namespace, options: Options) -> MergedBaseAdapter:
    """Reads, checks and merges the start adapter `name`, and writes what is to be merged.

    args: vLLM's. Raises ValueError for a base or options that it cannot be merged into, and
    AdapterError for the adapter (UnsupportedError where nothing of it is static, or where it is
    activated).
    """
    paths = dict(options.adapters)
    if name not in paths:
        known = ", ".join(paths) or "no adapter"
        raise ValueError(f"--merge-into-base: found {name!r}, expected a start adapter ({known})")
    base = replace(_base(args), extra_tokens=options.extra_vocab)
    adapter = formats.read(
        paths[name],
        options.limits,
        dict(options.layouts).get(name),
        base,
        name in options.residuals,
    )
    validate(adapter, base, options.limits)
    check_mergeable(adapter, f"--merge-into-base {name}")
    merged, _ = merge_static(adapter, base, options.merge_tolerance)
    if not mergeable_sites(merged):
        expected = "at least one without a router that depends on the token, and without magnitude"
        raise UnsupportedError(f"--merge-into-base {name}", "no static site", expected)
    directory = _root(options) / f"base-{merged.digest}"
    shutil.rmtree(directory, ignore_errors=True)
    native.write(merged, directory)
    return MergedBaseAdapter(name, adapter.digest, directory)


def _base(args: argparse.Namespace) -> BaseModel:
    """Raises ValueError for a base that no weights can be added to."""
    if args.load_format not in LOAD_FORMATS:
        expected = ", ".join(LOAD_FORMATS)
        raise ValueError(
            f"--merge-into-base: found --load-format {args.load_format}, expected one of {expected}"
        )
    if args.speculative_config:
        raise ValueError("--merge-into-base: found speculative decoding, expected none")
    try:
        config = AutoConfig.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
        quantised = args.quantization or getattr(config, "quantization_config", None)
        if quantised:
            raise ValueError("found a quantised base model, expected unquantised weights")
        return base_model(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"--merge-into-base: {args.model}: {error}") from error


def _root(options: Options) -> Path:
    """The store, or a directory that goes with the process."""
    if options.store is not None:
        return options.store.resolve()
    root = Path(tempfile.mkdtemp(prefix="molehill-"))
    weakref.finalize(_root, shutil.rmtree, root, ignore_errors=True)
    return root
