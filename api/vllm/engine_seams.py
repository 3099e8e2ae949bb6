"""What a server with several engines uses of vLLM's client of them."""

from molehill.engine.vllm.seams import Seam

APP, LIFELINE = "api/app.py", "api/vllm/engine_watch.py"

OPTIONS: tuple[Seam, ...] = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "api/vllm/launcher.py",
        "how many engines, and where",
        attributes=(
            "data_parallel_backend",
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_rank",
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_start_rank",
        ),
    ),
)

ENGINES: tuple[Seam, ...] = (
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        APP,
        "the probe of an adapter, on one engine of several",
        positional=("self", "prompt", "sampling_params", "request_id"),
        keywords=("lora_request", "data_parallel_rank"),
    ),
    Seam(
        "vllm.v1.engine.core_client",
        "MPClient",
        LIFELINE,
        "the engines of a client",
        attributes=("core_engines",),
    ),
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient._call_utility_async",
        LIFELINE,
        "asks one engine of several",
        positional=("self", "method"),
        keywords=("engine",),
    ),
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.collective_rpc_async",
        LIFELINE,
        "how an engine's workers are asked",
        markers=('"collective_rpc", method, timeout, args, kwargs',),
    ),
    Seam(
        "vllm.v1.engine.core_client",
        "DPLBAsyncMPClient.get_core_engine_for_request",
        "api/vllm/request_engines.py",
        "is extended: engines in the order of their ranks, and which of them a request is given to",
        overrides=("self", "request"),
        markers=("self.core_engines[eng_index]", "return chosen_engine"),
    ),
)
