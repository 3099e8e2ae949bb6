"""What vLLM's layers need around them."""

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The group of ranks that vLLM's linears ask for, of this process alone."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel()
        yield
    destroy_model_parallel()
    destroy_distributed_environment()
