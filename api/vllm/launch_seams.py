"""What `molehill serve` uses of vLLM before the engine starts, seam by seam."""

from molehill.api.vllm.engine_seams import OPTIONS
from molehill.api.vllm.process_seams import API_PROCESSES
from molehill.api.vllm.routed_seams import ROUTED_OPTION
from molehill.engine.vllm.seams import Seam

LAUNCH, STARTING = "api/vllm/launcher.py", "api/vllm/starting.py"

ARGUMENTS = "vllm.entrypoints.common.cli_args"
# Where they were until 0.32.
OLD_ARGUMENTS = ("vllm.entrypoints.launchers.cli_args",)
OLD_STARTUP = ("vllm.entrypoints.serve.utils.api_utils",)

MAKE_PARSER = Seam(
    ARGUMENTS,
    "make_arg_parser",
    LAUNCH,
    "vLLM's options",
    before=OLD_ARGUMENTS,
    positional=("parser",),
    markers=('"model_tag"', '"--headless"', '"--api-server-count"', '"--grpc"'),
)
VALIDATE_ARGUMENTS = Seam(
    ARGUMENTS,
    "validate_parsed_serve_args",
    LAUNCH,
    "vLLM's options",
    before=OLD_ARGUMENTS,
    positional=("args",),
)
SET_UP_ENVIRONMENT = Seam(
    "vllm.entrypoints.common.startup",
    "cli_env_setup",
    LAUNCH,
    "how vLLM starts its processes",
    before=OLD_STARTUP,
    positional=(),
)

LAUNCHER = (
    MAKE_PARSER,
    VALIDATE_ARGUMENTS,
    SET_UP_ENVIRONMENT,
    Seam(
        ARGUMENTS,
        "FrontendArgs",
        LAUNCH,
        "options of the API server",
        before=OLD_ARGUMENTS,
        attributes=(
            "api_key",
            "enable_server_load_tracking",
            "lora_modules",
            "ssl_ca_certs",
            "ssl_cert_reqs",
            "ssl_certfile",
            "ssl_keyfile",
        ),
    ),
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs",
        LAUNCH,
        "options of the engine",
        attributes=(
            "additional_config",
            "code_revision",
            "config_format",
            "default_mm_loras",
            "dtype",
            "enable_lora",
            "gpu_memory_utilization",
            "hf_config_path",
            "kv_cache_dtype",
            "kv_cache_memory_bytes",
            "load_format",
            "max_lora_rank",
            "max_loras",
            "max_model_len",
            "model",
            "pipeline_parallel_size",
            "quantization",
            "revision",
            "served_model_name",
            "speculative_config",
            "tensor_parallel_size",
            "trust_remote_code",
            "worker_cls",
        ),
    ),
    Seam(
        "vllm.envs",
        "",
        LAUNCH,
        "settings that are given, or refused",
        attributes=(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            "VLLM_CPU_KVCACHE_SPACE",
            "VLLM_MAX_N_SEQUENCES",
            "VLLM_PLUGINS",
            "VLLM_RINGBUFFER_WARNING_INTERVAL",
            "VLLM_SERVER_DEV_MODE",
            "VLLM_SKIP_MODEL_NAME_VALIDATION",
            "VLLM_USE_RUST_FRONTEND",
        ),
    ),
    Seam(
        "vllm.utils.argparse_utils",
        "FlexibleArgumentParser",
        LAUNCH,
        "vLLM's options",
        positional=(),
        keywords=("prog",),
    ),
    Seam(
        "vllm.logger",
        "configure_logging_from_args",
        LAUNCH,
        "vLLM's log options",
        positional=("args",),
    ),
    Seam(
        "vllm.transformers_utils.config",
        "get_config",
        "api/vllm/precision.py",
        "the model's config, before the engine has it",
        positional=(
            "model",
            "trust_remote_code",
            "revision",
            "code_revision",
            "config_format",
        ),
    ),
    Seam(
        "vllm.platforms",
        "current_platform",
        "api/vllm/precision.py",
        "whether a CPU is computed on",
    ),
    Seam(
        "vllm.entrypoints.cli.serve",
        "run_headless",
        LAUNCH,
        "runs workers of a server elsewhere",
        positional=("args",),
    ),
    Seam(
        "vllm.entrypoints.launchers.launcher",
        "setup_server",
        STARTING,
        "binds the server's socket",
        positional=("args",),
        keywords=("reuse_port",),
    ),
    Seam(
        "vllm.entrypoints.launchers.api_server.entry",
        "run_server_worker",
        STARTING,
        "runs the server",
        positional=("listen_address", "sock", "args"),
    ),
    Seam(
        "vllm.utils.system_utils",
        "decorate_logs",
        STARTING,
        "names the process in the log",
        positional=("process_name",),
        keywords=("skip_if_decorated",),
    ),
    *OPTIONS,
    *ROUTED_OPTION,
    *API_PROCESSES,
)
