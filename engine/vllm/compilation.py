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

from molehill.engine.system import startup

logger = logging.getLogger("vllm.molehill")

WORKER = "molehill.engine.vllm.worker.Worker"


def allow_compilation() -> None:
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
    from vllm import envs
    from vllm.compilation.counter import compilation_counter
    from vllm.config import CompilationMode

    if config.compilation_config.mode == CompilationMode.NONE:
        yield
        return
    what = "compiling the base model"
    place = f"{envs.VLLM_CACHE_ROOT}/torch_compile_cache"
    if envs.VLLM_DISABLE_COMPILE_CACHE:
        kept = "It is not kept, as VLLM_DISABLE_COMPILE_CACHE is set."
    elif config.compilation_config.mode == CompilationMode.VLLM_COMPILE:
        kept = f"It is kept in {place} for later starts with the same model and settings."
    else:
        # As on CPU: it stores the whole ("saved AOT compiled function"), and fails to load it
        # ("'function' object has no attribute 'finalize_loading'").
        kept = f"Parts of it are kept in {place}; vLLM compiles the rest again at every start."
    line = f"{what}: one to five minutes on a CPU. {kept} --enforce-eager starts "
    line += "without, and serves slower"
    before = compilation_counter.num_aot_artifacts_loaded
    with startup.long_step(what, line) as seconds:
        yield
    read = compilation_counter.num_aot_artifacts_loaded > before
    how = "read from the cache of compiled models" if read else "compiled"
    logger.info("molehill: base model %s in %.0f s", how, seconds())


def warn_of_one_graph(config: Any) -> None:
    """Logs a warning if steps without adapters have no graphs of their own."""
    if (
        not config.model_config.enforce_eager
        and not config.compilation_config.cudagraph_specialize_lora
    ):
        logger.warning(
            "molehill: cudagraph_specialize_lora is off: steps without adapters launch what steps "
            "with adapters do, or run without a CUDA graph"
        )
