"""A mixture-of-experts base whose experts are spread over engines, or over ranks.

vLLM 0.32 starts such servers on CPU, but no request was seen to come through there.
"""

import os
from pathlib import Path

import pytest
from support import share
from support.api_client import BASE, GOLDEN, KEY, Api, copy_adapter
from support.server import TINY, serve

pytestmark = pytest.mark.skipif(
    os.environ.get("MOLEHILL_LONG_TESTS") != "1",
    reason="a server for each way to spread experts; MOLEHILL_LONG_TESTS=1 runs it",
)

# What LoRA on the experts is refused for.
WAYS = {
    "data parallelism over experts": ("--data-parallel-size", "2"),
    "expert parallelism": ("--tensor-parallel-size", "2", "--enable-expert-parallel"),
}


@pytest.mark.parametrize("reason", WAYS)
def test_lora_on_spread_experts_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    root.mkdir()
    copy_adapter("drlora", root / "experts")
    arguments = [
        *(*TINY, "--served-model-name", BASE, "--api-key", KEY, "--max-num-seqs", "8"),
        *("--adapter-root", str(root), "--adapter-store", str(store), *WAYS[reason]),
    ]
    cores = share.cores()
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"} if cores else {}
    with serve(GOLDEN / "tiny-moe", tmp_path / "log", arguments, environment, warm=True) as server:
        api = Api(server.url, root, store)
        status, _, message = api.error(api.load("experts", "experts"))
        assert status == 422
        assert f"{reason} on this server" in message
        assert "experts" not in api.models()
