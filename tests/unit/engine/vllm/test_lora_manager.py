"""Which graph vLLM picks for a step, and what a step tells the backend: by vLLM's own two runners'
code, without a GPU."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.slot_worker import Worker
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, LoRAConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.lora_utils import (
    LoraState,
    create_lora_capture_hook,
    get_lora_capture_cases,
    get_num_active_loras_for_dispatch,
)
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from molehill.engine.adapter.errors import AdapterError
from molehill.engine.vllm.adapter_stats import AdapterStats
from molehill.engine.vllm.invocation_rows import InvocationRows
from molehill.engine.vllm.logits_rows import LogitsRows
from molehill.engine.vllm.lora_manager import LoRAManager
from molehill.engine.vllm.prefetch import StepPacer
from molehill.engine.vllm.routing_capture import RoutingCapture
from molehill.engine.vllm.token_rows import TokenRows
from molehill.kernels.interface import UNSERVED, Run
from molehill.kernels.vocabulary import Vocabulary

ADAPTER = 1000
MAX_LORAS = 4


class Runner(LoRAModelRunnerMixin):
    """A model runner as far as LoRA goes, with an adapter registered in its worker."""

    def __init__(self) -> None:
        worker = Worker()
        self.slot = worker.slots.store(ADAPTER, worker.adapter())
        self.runs: list[Run] | None = None
        slots = worker.slots
        self.lora_manager = LoRAManager(
            SimpleNamespace(
                slots=slots,
                pacer=StepPacer(),
                stats=AdapterStats(slots.counters, slots.resident_bytes),
                vocabulary=Vocabulary(),
            ),
            InvocationRows(self, {ADAPTER: ()}.get),
            RoutingCapture(self, worker.backend, slots.slot),
            LogitsRows(self, nn.Module(), lambda runs: None),
            TokenRows(nn.Module(), slots, self._begin_step),
        )

    def execute_model(self, scheduler_output: SchedulerOutput) -> None:
        """Steps without requests that an adapter is activated in: none is run here."""

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, tokens: dict[str, int]) -> None:
        """Prompts whose log-probabilities nobody asks for."""

    def _begin_step(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture(params=[False, True], ids=["one case", "a case per count"])
def config(request) -> VllmConfig:
    config = VllmConfig()
    config.lora_config = LoRAConfig(
        max_loras=MAX_LORAS, max_lora_rank=8, specialize_active_lora=request.param
    )
    compilation = config.compilation_config
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [1, 2, 4, 8], 8
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    return config


def test_the_graph_without_adapters_is_captured_without_rows_of_any(runner, config) -> None:
    """Both runners capture each size once for no adapter and once or more for some."""
    dispatcher = CudagraphDispatcher(config)
    cases = dispatcher._get_lora_cases()
    assert cases == get_lora_capture_cases(config.lora_config, config.compilation_config)
    assert cases[0] == 0
    second = create_lora_capture_hook(config.lora_config, runner)
    for case in cases:
        with runner.maybe_dummy_run_with_lora(
            config.lora_config, np.full(8, 1), np.full(8, 1), False, case
        ):
            first = runner.runs
            second(case, 8, 8)
            assert runner.runs == first
        assert {run.slot for run in first} == (set() if case == 0 else {UNSERVED})
        assert sum(run.stop - run.start for run in first) == (0 if case == 0 else 8)


def test_a_base_step_replays_that_graph_whatever_is_registered(runner, config) -> None:
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_DECODE_ONLY)
    requests = LoraState(max_num_reqs=8)
    requests.add_request("base", 0, None)
    requests.add_request("mixture", 1, LoRARequest("mixture", ADAPTER, "/somewhere"))
    for names, active in ((["base"], 0), (["base", "mixture"], 1)):
        asked = config.lora_config, requests, names, False
        assert get_num_active_loras_for_dispatch(*asked) == active
        mode, key = dispatcher.dispatch(3, True, active > 0, active)
        assert mode == CUDAGraphMode.FULL
        assert key.has_lora is (active > 0)
        rows = np.full(len(names), 1, np.int32)
        runner._set_active_loras(
            *requests.make_lora_inputs(names, np.arange(len(names)), rows),
        )
        assert runner.runs == ([Run(runner.slot, 1, 2)] if active else [])


@pytest.mark.parametrize("answers_last", [True, False])
def test_of_ranks_that_refuse_together_the_last_to_answer_raises(answers_last: bool) -> None:
    """vLLM reads the others' answers before, and none after it."""

    def add(name: str, key: Any) -> None:
        raise AdapterError("x", "this", "that")

    manager: Any = Runner().lora_manager
    manager._adapters = SimpleNamespace(add=add, answers_last=answers_last)
    request = LoRARequest("x", 7, "path")
    if answers_last:
        with pytest.raises(AdapterError):
            manager.add_adapter(request)
    else:
        assert manager.add_adapter(request) is False
