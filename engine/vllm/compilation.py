"""Lets vLLM compile the model on CPU while adapters are enabled, and says that it does.

vLLM's CPU platform forces eager execution whenever a LoRA config is there, for its own LoRA layers
cannot be traced. molehill's ops are opaque to the compiler, so with molehill's worker that gate is
needless. It stands in the process that makes the engine's config, and only there.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molehill.engine import startup

logger = logging.getLogger("vllm.molehill")

WORKER = "molehill.engine.vllm.worker.Worker"


def lift_gate() -> None:
    """Hides the LoRA config from CpuPlatform's config check, for molehill's worker only."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__
    if getattr(original, "lifted_by_molehill", False):
        return

    @functools.wraps(original)
    def check(cls: type, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if vllm_config.parallel_config.worker_cls == WORKER:
            vllm_config.lora_config = None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    check.lifted_by_molehill = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check)


@contextmanager
def announced(config: Any) -> Iterator[None]:
    """Around the step of a worker's start in which the model is compiled, if it is.

    vLLM says nothing meanwhile, but for a line of the engine core's about a shared memory block:
    that is where it waits for this worker.
    """
    from vllm.config import CompilationMode

    if config.compilation_config.mode == CompilationMode.NONE:
        yield
        return
    what, cache = "compiling the base model", cache_of(config)
    line = (
        f"{what}: one to five minutes on a CPU the first time. It is kept in {cache}, and later "
        "starts with the same model and settings read it there. --enforce-eager starts without, "
        "and serves slower"
    )
    with startup.long_step(what, line) as seconds:
        yield
    found, made = cached_graphs()
    took = f"{seconds():.0f} s"
    if found and not made:
        logger.info("molehill: base model read from the cache of compiled models in %s", took)
    else:
        text = "molehill: base model compiled in %s; the next start reads it from %s"
        logger.info(text, took, cache)


def cache_of(config: Any) -> str:
    """Where what is compiled is kept."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from vllm.config import CompilationMode

    if config.compilation_config.mode == CompilationMode.VLLM_COMPILE:
        return config.compilation_config.cache_dir or "vLLM's cache"
    return str(cache_dir())


def cached_graphs() -> tuple[int, int]:
    """Of this process: graphs that were found in torch's cache, and graphs that were compiled."""
    from torch._dynamo.utils import counters

    own = counters["inductor"]
    return own["fxgraph_cache_hit"], own["fxgraph_cache_miss"] + own["fxgraph_cache_bypass"]
