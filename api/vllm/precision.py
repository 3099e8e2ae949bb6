"""Settles `--dtype` before a server starts on CPU."""

import argparse
import logging
import os
from typing import Any

from molehill.engine.vllm import precision, quantisation

logger = logging.getLogger("vllm.molehill")

# Those whose files are read for the number of parameters.
LOAD_FORMATS = ("auto", "hf", "safetensors")


def choose_dtype(args: argparse.Namespace) -> None:
    """Refuses a dtype that the model's kernels do not take, and weights for which there is no
    kernel, and chooses a dtype where none is given.

    args: vLLM's, with the KV cache's size settled; `dtype` changes. Raises ValueError.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    config = read_config(args)
    if config is None:
        return
    precision.check(config, args.dtype)
    quantisation.check(config)
    if args.dtype != precision.AUTO or args.quantization:
        return
    choice = precision.choose(config, lambda: parameters(args), lambda: room(args, config))
    args.dtype = choice.dtype
    if choice.why:
        logger.info(choice.why)


def read_config(args: argparse.Namespace) -> Any:
    """The model's config; None where it cannot be read, which vLLM will explain."""
    from vllm.transformers_utils.config import get_config

    try:
        return get_config(
            args.hf_config_path or args.model,
            args.trust_remote_code,
            args.revision,
            args.code_revision,
            args.config_format,
        )
    except Exception:
        return None


def parameters(args: argparse.Namespace) -> int:
    """How many parameters the checkpoint has; 0 where it cannot be told before it is loaded."""
    if args.load_format not in LOAD_FORMATS:
        return 0
    try:
        return precision.count_parameters(args.model, args.revision)
    except Exception as error:
        logger.debug("%s: cannot count parameters: %s", args.model, error)
        return 0


def room(args: argparse.Namespace, config: Any) -> precision.Room:
    """What this machine has free, or the share of its memory that vLLM is given."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    cache = int(space) << 30 if space else args.kv_cache_memory_bytes
    free, total = precision.memory()
    available = free if cache else min(free, int(total * args.gpu_memory_utilization))
    workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    cache = (cache or 0) * workers
    tokens = args.max_model_len
    if tokens is None:
        tokens = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    fits_itself = tokens < 0 or args.kv_cache_dtype != precision.AUTO
    return precision.Room(available, cache, 0 if fits_itself else tokens)
