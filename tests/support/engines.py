"""Engines on the tiny model, one per configuration: starting one takes 20-40 s."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support import warm
from support.golden import TINY_LLAMA

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM writes zeros into all of it.
KV_CACHE_BYTES = 64 << 20


@contextmanager
def engine(**options: Any) -> Iterator[Any]:
    """vLLM's own `LLM` with molehill's worker, in float32; on the tiny Llama unless `model` says
    otherwise."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": str(TINY_LLAMA),
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 32,
        "enable_lora": True,
        "max_loras": 30,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "worker_cls": "molehill.engine.vllm.worker.Worker",
        "max_logprobs": -1,
        "logprobs_mode": "raw_logits",
        **options,
    }
    with warm.start():
        llm = LLM(**settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
