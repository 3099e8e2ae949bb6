"""What vLLM's eager CPU workers lack as stages of a pipeline."""

from typing import Any

from vllm.distributed import get_pp_group


def make_stage_inputs(runner: Any) -> None:
    """The buffers in which a later stage takes what the stage before it computed.

    vLLM 0.32 makes them in its first profiling run, which it leaves out on CPU where nothing is to
    be compiled: the first step then fails an assertion, with or without adapters. Nothing changes
    where they are there.

    runner: vLLM's model runner, on a CPU.
    """
    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )
