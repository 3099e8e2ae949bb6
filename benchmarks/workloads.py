"""What an engine is asked for, and how fast it answers: decode, prefill, requests that arrive."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

# Tokens of the prompts whose decode is measured.
PROMPT = 16
# Ids below are special in many vocabularies, ids above are not in all.
IDS = range(100, 40000)


class OverBudgetError(Exception):
    """A workload took too long and was stopped."""


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `prompt` tokens, `tokens` generated each. rate: requests per second that
    arrive one by one, at random; 0 for all at once."""

    batch: int
    prompt: int
    tokens: int
    rate: float = 0.0

    @property
    def is_prefill(self) -> bool:
        return self.tokens == 1

    @property
    def name(self) -> str:
        if self.rate:
            return f"{self.rate:.3g} requests/s"
        if self.is_prefill:
            return f"prefill {self.batch}x{self.prompt}"
        return f"decode {self.batch}" + ("" if self.prompt == PROMPT else f" at {self.prompt}")

    @property
    def work(self) -> str:
        return f"{self.batch} x ({self.prompt} + {self.tokens}) tokens"


@dataclass(frozen=True)
class Timeline:
    """Seconds of one request: when it arrived, and when each of its tokens did."""

    arrived: float
    tokens: list[float]

    @property
    def first(self) -> float:
        return self.tokens[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        return [
            later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)
        ]


def measure(
    llm: Any, workload: Workload, requests: Sequence[Any], seed: int, budget: float
) -> dict[str, float]:
    """Figures by name: `tokens_per_s`, or of requests that arrive, milliseconds of TTFT and ITL.

    requests: LoRARequests or None; the prompts take them in turn. Raises OverBudgetError at the
    first step that ends after `budget` seconds.
    """
    if workload.rate:
        return latencies(_arriving(llm, workload, requests, seed, budget))
    return {"tokens_per_s": _speed(llm, workload, requests, seed, budget)}


def prompts_of(
    llm: Any, workload: Workload, generator: random.Random
) -> list[dict[str, list[int]]]:
    last = min(IDS.stop, llm.llm_engine.model_config.get_vocab_size())
    return [
        {"prompt_token_ids": [generator.randrange(IDS.start, last) for _ in range(workload.prompt)]}
        for _ in range(workload.batch)
    ]


def _sampling(workload: Workload) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=workload.tokens, ignore_eos=True, detokenize=False
    )


def _speed(
    llm: Any, workload: Workload, requests: Sequence[Any], seed: int, budget: float
) -> float:
    """Tokens per second: from the first to the last generated one, or of prompts until then."""
    prompts = prompts_of(llm, workload, random.Random(seed))
    loras = [requests[i % len(requests)] for i in range(workload.batch)]
    end = time.perf_counter() + budget
    start = time.perf_counter()
    names = llm.enqueue(prompts, _sampling(workload), lora_request=loras, use_tqdm=False)
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in llm.llm_engine.step() if output.finished]
        if time.perf_counter() > end and llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.abort_request(names, internal=True)
            raise OverBudgetError
    seconds = time.perf_counter() - start
    if workload.is_prefill:
        return workload.batch * workload.prompt / seconds
    first = max(output.metrics.first_token_ts for output in outputs)
    last = max(output.metrics.last_token_ts for output in outputs)
    return float(workload.batch * (workload.tokens - 1) / (last - first))


def _arriving(
    llm: Any, workload: Workload, requests: Sequence[Any], seed: int, budget: float
) -> list[Timeline]:
    """Requests come at exponential intervals, as those of many users do. They are handed to the
    engine between two of its answers; what that costs them is in their TTFT."""
    generator, engine = random.Random(seed), llm.llm_engine
    prompts = prompts_of(llm, workload, generator)
    sampling, at, start = _sampling(workload), 0.0, time.perf_counter()
    waiting: list[tuple[float, str, int]] = []
    for i in range(workload.batch):
        at += generator.expovariate(workload.rate)
        waiting.append((start + at, f"{workload.name}-{seed}-{i}", i))
    times: dict[str, Timeline] = {}
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter()
        if now > start + budget:
            engine.abort_request(list(times), internal=False)
            raise OverBudgetError
        while waiting and waiting[0][0] <= now:
            arrived, name, i = waiting.pop(0)
            times[name] = Timeline(arrived, [])
            lora = requests[i % len(requests)]
            engine.add_request(name, prompts[i], sampling, lora_request=lora)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][0] - time.perf_counter()))
            continue
        for output in engine.step():
            new = len(output.outputs[0].token_ids) - len(times[output.request_id].tokens)
            times[output.request_id].tokens.extend([time.perf_counter()] * new)
    return list(times.values())


def latencies(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Milliseconds to the first token (TTFT) and between tokens (ITL), median and 99th percentile
    over all requests."""
    result = {}
    for name, seconds in (
        ("ttft", [timeline.first for timeline in timelines]),
        ("itl", [gap for timeline in timelines for gap in timeline.gaps]),
    ):
        for percent in (50, 99):
            result[f"{name}_p{percent}_ms"] = 1e3 * percentile(seconds, percent)
    return result


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two nearest values; of a single one, that."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]
