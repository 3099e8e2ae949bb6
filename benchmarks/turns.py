"""Contestants by turns: every one meets the same noise of the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from molehill.benchmarks.contestants import VLLM_LORA, Contestant
from molehill.benchmarks.engines import progress
from molehill.benchmarks.results_table import Sample
from molehill.benchmarks.workloads import PROMPT, OverBudgetError, Workload, measure

# vLLM's own LoRA reads a prompt at some 20 tokens/s on a CPU: it gets short ones and few tokens.
FEW = 12


class Measurements:
    """samples: what was measured. stopped: by contestant and workload, what took longer than
    `budget` seconds: it is left out from then on."""

    def __init__(self, repetitions: int, budget: float) -> None:
        self.samples: list[Sample] = []
        self.stopped: dict[tuple[str, str], str] = {}
        self._repetitions, self._budget = repetitions, budget
        self._is_cpu = not torch.cuda.is_available()

    def take(
        self,
        running: Mapping[str, Any],
        requests: Mapping[str, Sequence[Any]],
        contestants: Sequence[Contestant],
        workloads: Sequence[Workload],
    ) -> None:
        """running: engines by name. requests: LoRARequests by contestant."""
        for repetition in range(-1, self._repetitions):  # The first one warms up.
            for workload, contestant in product(workloads, contestants):
                asked = self._asked(contestant, workload)
                if asked is not None and (contestant.name, workload.name) not in self.stopped:
                    llm = running[contestant.engine]
                    self._turn(
                        llm,
                        requests[contestant.name],
                        contestant.name,
                        workload.name,
                        asked,
                        repetition,
                    )

    def _asked(self, contestant: Contestant, workload: Workload) -> Workload | None:
        if len(contestant.paths) > 1 and workload.batch == 1:
            return None
        if not (self._is_cpu and contestant.engine == VLLM_LORA):
            return workload
        if workload.prompt > PROMPT:
            return None
        return replace(workload, tokens=min(FEW, workload.tokens))

    def _turn(
        self,
        llm: Any,
        requests: Sequence[Any],
        contestant: str,
        name: str,
        workload: Workload,
        repetition: int,
    ) -> None:
        turn = str(repetition) if repetition >= 0 else "warm-up"
        where = f"{turn:7} {name:18} {contestant:34}"
        try:
            measurements = measure(llm, workload, requests, repetition, self._budget)
        except OverBudgetError:
            self.stopped[contestant, name] = (
                f"{contestant}, {name}: stopped in repetition {repetition}, "
                f"{workload.work} take more than {self._budget:.0f} s"
            )
            progress(f"{where} stopped after {self._budget:.0f} s and left out")
            return
        progress(
            f"{where} {'  '.join(f'{key} {value:.1f}' for key, value in measurements.items())}"
        )
        if repetition >= 0:
            self.samples += [
                Sample(contestant, name, key, repetition, value)
                for key, value in measurements.items()
            ]
