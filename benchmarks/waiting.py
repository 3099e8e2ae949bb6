"""What it costs and gains that vLLM's processes sleep, where they would spin, while they wait.

    python benchmarks/waiting.py MODEL [--dtype float32] [--batches 1,8] [--tokens 48]

Two engines of plain vLLM live side by side and take turns, one as vLLM is (`spin`) and one with
molehill's plugin (`sleep`). By repetition: tokens per second from the first to the last one, the
longest time without a token, and the share of a core that the engine's own process and its worker
take. Run it on a machine that does nothing else.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import psutil

from molehill.benchmarks.host import host

# VLLM_PLUGINS of each arm. An empty one loads none.
ARMS = {"spin": "", "sleep": "molehill"}
PROMPT, LONGEST = 16, 4096
# Seconds. After its last step a worker goes on spinning for one, which the other arm would feel.
PAUSE = 1.5


@dataclass(frozen=True)
class EngineTurn:
    """speed: tokens/s of the batch. gap: the most seconds without a token. cores: by process."""

    speed: float
    gap: float
    cores: dict[str, float]

    def __str__(self) -> str:
        cores = ", ".join(f"{name} {share:.2f}" for name, share in self.cores.items())
        return f"{self.speed:7.1f} tokens/s, longest gap {self.gap:.3f} s; cores: {cores}"


class EngineArm:
    """An engine and the processes that it started."""

    def __init__(self, model: str, plugins: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        before = set(psutil.Process().children(recursive=True))
        os.environ["VLLM_PLUGINS"] = plugins
        self.engine = LLM(model, **options).llm_engine
        started = set(psutil.Process().children(recursive=True)) - before
        self._processes = {
            role: next(process for process in started if role in process.name())
            for role in ("EngineCore", "Worker")
        }

    def _seconds(self) -> dict[str, float]:
        times = {role: process.cpu_times() for role, process in self._processes.items()}
        return {role: cpu_times.user + cpu_times.system for role, cpu_times in times.items()}

    def turn(self, batch: int, tokens: int, seed: int) -> EngineTurn:
        """Generates `tokens` for each of `batch` prompts."""
        from vllm import SamplingParams

        generator = random.Random(seed)
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for number in range(batch):
            ids = [generator.randrange(3, 400) for _ in range(PROMPT)]
            name = f"{batch}-{seed}-{number}"
            self.engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        arrived = []
        cpu: dict[str, float] = {}
        while self.engine.has_unfinished_requests():
            if self.engine.step():
                arrived.append(time.perf_counter())
                cpu = cpu or self._seconds()
        seconds = arrived[-1] - arrived[0]
        gap = max(later - earlier for earlier, later in itertools.pairwise(arrived))
        cores = {role: (after - cpu[role]) / seconds for role, after in self._seconds().items()}
        return EngineTurn(batch * (tokens - 1) / seconds, gap, cores)

    def idle(self) -> dict[str, float]:
        """Shares of a core that are taken without any request."""
        before, start = self._seconds(), time.perf_counter()
        time.sleep(5)
        seconds = time.perf_counter() - start
        return {role: (after - before[role]) / seconds for role, after in self._seconds().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    options = {
        "dtype": args.dtype,
        "max_model_len": LONGEST,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        # Rotary positions: a model of fewer goes on beyond them.
        "hf_overrides": {"max_position_embeddings": LONGEST},
    }
    print(host(), flush=True)
    arms = {name: EngineArm(args.model, plugins, options) for name, plugins in ARMS.items()}
    try:
        for batch in map(int, args.batches.split(",")):
            ratios = []
            for repetition in range(-1, args.repetitions):  # the first one warms up
                speeds = {}
                for name in sorted(arms, reverse=bool(repetition % 2)):
                    turn = arms[name].turn(batch, args.tokens, repetition)
                    speeds[name] = turn.speed
                    if repetition >= 0:
                        print(f"batch {batch} {name:5} {turn}", flush=True)
                    time.sleep(PAUSE)
                if repetition >= 0:
                    ratios.append(speeds["sleep"] / speeds["spin"])
            print(
                f"batch {batch}: speed, sleep / spin: median {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} repetitions)",
                flush=True,
            )
        for name, arm in arms.items():
            print(f"idle {name}: cores {arm.idle()}", flush=True)
    finally:
        for arm in arms.values():
            arm.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
