"""What a server of several API processes uses of vLLM's own."""

from molehill.engine.vllm.seams import Seam

PROCESSES = "api/vllm/api_processes.py"

API_PROCESSES: tuple[Seam, ...] = (
    Seam(
        "vllm.entrypoints.cli.serve",
        "run_multi_api_server",
        PROCESSES,
        "starts engines and API processes, and ends them together",
        positional=("args",),
        markers=("setup_multiprocess_prometheus()", "APIServerProcessManager("),
    ),
    Seam(
        "vllm.v1.utils",
        "APIServerProcessManager",
        PROCESSES,
        "what each process runs is replaced",
        markers=(
            "target_server_fn: Callable",
            "target=target_server_fn or run_api_server_worker_proc",
            '"client_index": i',
        ),
    ),
    Seam(
        "vllm.v1.utils",
        "run_api_server_worker_proc",
        PROCESSES,
        "runs one process",
        positional=("listen_address", "sock", "args", "client_config"),
    ),
    Seam(
        "vllm.v1.utils",
        "wait_for_completion_or_failure",
        PROCESSES,
        "a process that fails ends the server",
        markers=("proc.exitcode != 0",),
    ),
    Seam(
        "vllm.envs",
        "",
        PROCESSES,
        "whether answers are kept in the process that gave them",
        attributes=("VLLM_ENABLE_RESPONSES_API_STORE",),
    ),
)
