"""The engines of a run, side by side: idle ones wait, and each adapter is loaded once."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from molehill.benchmarks.contestants import MOLEHILL, PLAIN, VLLM_LORA, Contestant, memory, rank_of
from molehill.engine import formats

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Of a GPU, for all engines together; bytes of what one has beside weights and adapters.
SHARE, KV_CACHE = 0.9, 6 << 30


def progress(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


@contextmanager
def running(
    model: str,
    contestants: Sequence[Contestant],
    options: Mapping[str, Any],
    weights: int,
    itemsize: int,
) -> Iterator[dict[str, Any]]:
    """By name, the engines that the contestants need. options: of each. weights: bytes of the base.
    itemsize: bytes of a number of an adapter. A GPU is shared by what each needs."""
    from vllm import LLM

    from molehill.engine.vllm import compilation
    from molehill.engine.vllm.settings import Settings

    names = list(dict.fromkeys(contestant.engine for contestant in contestants))
    room = {name: memory(contestants, name, itemsize) for name in names}
    needed = {name: weights + room[name] + KV_CACHE for name in names}
    if not torch.cuda.is_available():
        compilation.allow_compilation()
    options_of: dict[str, dict[str, Any]] = {
        PLAIN: {},
        MOLEHILL: {
            "worker_cls": compilation.WORKER,
            "enable_lora": True,
            "max_loras": _most(contestants, MOLEHILL),
            "additional_config": Settings(memory=room.get(MOLEHILL, 0)).to_config(),
        },
        VLLM_LORA: _vllm_lora(contestants),
    }
    engines: dict[str, Any] = {}
    try:
        for name in names:
            progress(f"starting {name}")
            share = SHARE * needed[name] / sum(needed.values())
            shared = {"gpu_memory_utilization": share} if torch.cuda.is_available() else {}
            engines[name] = LLM(model, **options, **shared, **options_of[name])
        yield engines
    finally:
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()


def _most(contestants: Sequence[Contestant], engine: str) -> int:
    """Adapters in one batch."""
    return max(
        [1, *(len(contestant.paths) for contestant in contestants if contestant.engine == engine)]
    )


def _vllm_lora(contestants: Sequence[Contestant]) -> dict[str, Any]:
    path = next(
        (contestant.paths[0] for contestant in contestants if contestant.engine == VLLM_LORA), None
    )
    if path is None:
        return {}
    # vLLM's LoRA allocates for this many and this rank.
    most, rank = _most(contestants, VLLM_LORA), rank_of(formats.read(path))
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": most, "max_cpu_loras": most}


def load(engines: Mapping[str, Any], contestants: Sequence[Contestant]) -> dict[str, list[Any]]:
    """The LoRARequests of each contestant by its name, loaded; [None] of the base's. Copies of one
    path are adapters of their own, with weights of their own."""
    from vllm.lora.request import LoRARequest

    requests: dict[str, list[Any]] = {}
    number = 0
    for contestant in contestants:
        requests[contestant.name] = [] if contestant.paths else [None]
        for path in contestant.paths:
            number += 1
            request = LoRARequest(f"adapter-{number}", number, str(path))
            engines[contestant.engine].llm_engine.add_lora(request)
            requests[contestant.name].append(request)
    return requests


def chosen(engines: Mapping[str, Any], requests: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """By contestant on molehill's engine: `experts` per decision and the share that is `soft`, as
    the worker counted; nothing of those that do not route."""
    from molehill.engine.vllm import protocol

    if MOLEHILL not in engines:
        return {}
    asked = protocol.to_wire(protocol.StatsRequest())
    answers = engines[MOLEHILL].collective_rpc(protocol.STATS.method, args=(asked,))
    reply = protocol.STATS.replies(answers)[0]
    result = {}
    for name, loaded in requests.items():
        ids = [request.lora_int_id for request in loaded if request is not None]
        stats = [reply.adapters[number].stats for number in ids if number in reply.adapters]
        decisions = sum(one.decisions for one in stats)
        if decisions:
            experts = sum(sum(one.expert_tokens) for one in stats) / decisions
            result[name] = {"experts": experts, "soft": sum(one.soft for one in stats) / decisions}
    return result
