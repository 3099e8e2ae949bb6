"""The golden cases under other engine configurations give what the plain one gives."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from asking import ask, assert_golden, every_prompt
from engines import engine
from golden import SERVED


@dataclass(frozen=True)
class Configuration:
    """options of `LLM`, and environment variables that its workers inherit."""

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


TORCH = {"additional_config": {"molehill": {"backend": "torch"}}}
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

CONFIGURATIONS = {
    "chunked prefill, C++ without vector instructions": Configuration(
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 24},
        {"MOLEHILL_CPU_ISA": "portable"},
    ),
    "chunked prefill, torch backend": Configuration(
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 24, **TORCH}
    ),
    "tensor parallel": Configuration(TWO_RANKS, A_CORE_EACH),
    "tensor parallel, torch backend": Configuration({**TWO_RANKS, **TORCH}, A_CORE_EACH),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_matches_the_reference(name: str, authored: Any, monkeypatch: Any) -> None:
    configuration = CONFIGURATIONS[name]
    for variable, value in configuration.environment.items():
        monkeypatch.setenv(variable, value)
    # The first two prompts of the base and of every method, in one batch.
    prompts = every_prompt()[: 2 * (1 + len(SERVED))]
    prompts += [prompt for own in authored.values() for prompt in own.prompts]
    others = {name: own.path for name, own in authored.items()}
    with engine(**configuration.options, max_loras=30) as llm:
        assert_golden(ask(llm, prompts, others=others), prompts)
