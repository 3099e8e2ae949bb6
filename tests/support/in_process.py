"""Engines one after another in one process, each of which starts in a second or two.

vLLM's engine, scheduler and molehill's worker are those of any other engine; what is left out are
the processes around them. Whoever tests the processes uses support.engines.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from support import torchvision, warm
from support.asking import Reply, ask_each
from support.golden import Prompt

SECONDS = 900


@dataclass(frozen=True)
class Job:
    """What one engine is asked, in one batch. adapters: by name, each loaded before; prompts: their
    `case` is an adapter's name, or `base`. options: of vLLM's `LLM`. inputs: what it is given in
    place of a prompt's ids, by the prompt's number."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[Prompt]
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """refused: errors of loading by the adapter's name; its prompts have no reply. failed: what
    ended the engine. counters: vLLM's by name, where the engine has `disable_log_stats=False`."""

    replies: dict[int, Reply] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    counters: dict[str, int] = field(default_factory=dict)


def answer(
    jobs: dict[str, Job], directory: Path, with_torchvision: bool = False
) -> dict[str, Answers]:
    """By the jobs' names. directory: for what goes between the processes. with_torchvision: in a
    process that imports vLLM anew."""
    torch.save(jobs, directory / "jobs.pt")
    log = directory / "log"
    if with_torchvision:
        torchvision.run(_answer_all, directory, log)
    else:
        process = warm.run(partial(_answer_all, directory), log)
        process.wait(SECONDS)
        assert process.returncode == 0, log.read_text()[-4000:]
    answers: dict[str, Answers] = torch.load(directory / "answers.pt", weights_only=False)
    return answers


def _answer_all(directory: Path) -> None:
    """In the new process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    # vLLM imports each model's file in a process of its own, which imports vLLM again, lest CUDA be
    # initialised.
    registry._run_in_subprocess = lambda function: function()
    jobs: dict[str, Job] = torch.load(directory / "jobs.pt", weights_only=False)
    answers = {}
    for name, job in jobs.items():
        # vLLM collects garbage time and again, which takes half of an engine's start where all that
        # is imported is looked through.
        gc.freeze()
        try:
            answers[name] = _answer(job)
        except Exception as error:
            answers[name] = Answers(failed=f"{type(error).__name__}: {error}")
        finally:
            cleanup_dist_env_and_memory()
    torch.save(answers, directory / "answers.pt")


def _answer(job: Job) -> Answers:
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 26,
        "enable_lora": True,
        "max_loras": 8,
        "worker_cls": "molehill.engine.vllm.worker.Worker",
        "distributed_executor_backend": "uni",
        "max_logprobs": -1,
        "logprobs_mode": "raw_logits",
        "enforce_eager": True,
        **job.options,
    }
    llm = LLM(model=str(job.model), **settings)
    try:
        return _ask(llm, job)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _ask(llm: Any, job: Job) -> Answers:
    requests, refused = _load(llm, job)
    asked = [i for i, prompt in enumerate(job.prompts) if prompt.case not in refused]
    replies = ask_each(
        llm,
        [job.inputs.get(i, list(job.prompts[i].ids)) for i in asked],
        [requests.get(job.prompts[i].case) for i in asked],
        job.steps,
    )
    counters = {} if job.options.get("disable_log_stats", True) else _counters(llm)
    return Answers(dict(zip(asked, replies, strict=True)), refused, counters=counters)


def _counters(llm: Any) -> dict[str, int]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def _load(llm: Any, job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    from vllm.lora.request import LoRARequest

    requests, refused = {}, {}
    for number, (name, path) in enumerate(job.adapters.items(), start=1):
        request = LoRARequest(name, number, str(path))
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            refused[name] = str(error)
        else:
            requests[name] = request
    return requests, refused


def replies_of(answers: Answers, prompts: Sequence[Prompt]) -> list[Reply]:
    """In the order of the job's prompts, all of which have one."""
    assert not answers.failed, answers.failed
    refused = answers.refused.keys() & {prompt.case for prompt in prompts}
    assert not refused, answers.refused
    return [answers.replies[i] for i in range(len(prompts))]
