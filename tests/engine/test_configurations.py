"""The golden cases under other engine configurations give what the plain one gives."""

from typing import Any

import pytest
from asking import ask, assert_golden, every_prompt
from engines import engine

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 24},
    "tensor parallel": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_matches_the_reference(name: str, monkeypatch: Any) -> None:
    options = CONFIGURATIONS[name]
    if "tensor_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = every_prompt()
    with engine(**options) as llm:
        assert_golden(ask(llm, prompts), prompts)
