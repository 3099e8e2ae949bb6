"""What the API side uses of vLLM, seam by seam, and where versions of vLLM differ in it.

LAUNCHER: before the engine starts. SERVER: in vLLM's API server.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from molehill.api.vllm.engine_seams import ENGINES
from molehill.api.vllm.launch_seams import (
    LAUNCHER,
    MAKE_PARSER,
    SET_UP_ENVIRONMENT,
    VALIDATE_ARGUMENTS,
)
from molehill.api.vllm.render_seams import RENDERING
from molehill.api.vllm.routed_seams import ROUTED_EXPERTS
from molehill.engine.vllm import compat as engine
from molehill.engine.vllm import seams
from molehill.engine.vllm.seams import Seam

CALLS, MODELS = "api/vllm/leased_calls.py", "api/vllm/served_models.py"
SPANS = "api/vllm/spans.py"
METRICS, ENGINE_WATCH, APP = "api/vllm/engine_metrics.py", "api/vllm/engine_watch.py", "api/app.py"


SERVER = (
    Seam(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin.attach_router",
        APP,
        "where routes are added",
        overrides=("self", "app"),
    ),
    Seam(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin.init_state",
        APP,
        "where the registry is set up",
        overrides=("self", "engine_client", "state", "args"),
    ),
    Seam(
        "vllm.entrypoints.launchers.api_server.app_state",
        "",
        APP,
        "what a server's state holds",
        markers=(
            "state.engine_client = ",
            "state.openai_serving_models = ",
            "state.args = ",
            "state.online_renderer = ",
        ),
    ),
    Seam(
        "vllm.entrypoints.launchers.app",
        "",
        APP,
        "what a server's state holds before the engine starts",
        markers=("app.state.args = ",),
    ),
    Seam(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        MODELS,
        "the names that are served; its adapters are the registry's",
        attributes=(
            "base_model_paths",
            "is_base_model",
            "lora_requests",
            "registry",
            "show_available_models",
        ),
    ),
    Seam(
        "vllm.entrypoints.serve.engine.serving",
        "",
        APP,
        "looks a request's model up, which admits the request",
        markers=("self.models.lora_requests[request.model]", "in self.models.lora_requests:"),
    ),
    Seam(
        "vllm.entrypoints.openai.models.protocol",
        "BaseModelPath",
        MODELS,
        "a name of the base model",
        positional=("name", "model_path"),
        attributes=("name", "model_path"),
    ),
    Seam("vllm.exceptions", "VLLMNotFoundError", MODELS, "a model that is not served"),
    Seam(
        "vllm.exceptions",
        "VLLMValidationError",
        CALLS,
        "a request that is wrong",
        positional=("message",),
        keywords=("parameter",),
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "",
        "api/vllm/invocation.py",
        "tells the steps of a beam search",
        markers=(
            'request_id_batch = f"{request_id}-{random_uuid()}"',
            'request_id_item = f"{request_id_batch}-beam-{i}"',
            "detokenize=False,",
        ),
    ),
    Seam(
        "vllm.exceptions",
        "GracefulHTTPError",
        "api/vllm/request_scope.py",
        "a refusal with a status",
        positional=("message", "http_status"),
    ),
    Seam(
        "vllm.entrypoints.serve.exception_handling.error_response",
        "create_error_response",
        "api/vllm/generation_header.py",
        "a refusal as vLLM's routes write it",
        positional=("message",),
    ),
    Seam(
        "vllm.sampling_params",
        "RequestOutputKind",
        CALLS,
        "whether outputs hold only what is new",
        attributes=("DELTA",),
    ),
    Seam(
        "vllm.sampling_params",
        "SamplingParams",
        "api/vllm/probe.py",
        "the probe of an adapter",
        positional=(),
        keywords=("max_tokens", "temperature", "prompt_logprobs"),
        attributes=("output_kind",),
    ),
    Seam(
        "vllm.outputs",
        "RequestOutput",
        "api/vllm/probe.py",
        "what the engine answers",
        attributes=("finished", "prompt_logprobs"),
    ),
    Seam("vllm.outputs", "PoolingRequestOutput", CALLS, "an answer", attributes=("finished",)),
    Seam(
        "vllm.outputs",
        "RequestOutput.add",
        "api/vllm/read_ahead.py",
        "merges outputs that a client has not read",
        positional=("self", "next_output"),
        keywords=("aggregate",),
    ),
    Seam(
        "vllm.logprobs",
        "Logprob",
        "api/vllm/probe.py",
        "the probe of an adapter",
        attributes=("logprob",),
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        APP,
        "the engine",
        attributes=(
            "dead_error",
            "engine_core",
            "errored",
            "get_supported_tasks",
            "is_paused",
            "is_tracing_enabled",
            "logger_manager",
            "model_config",
            "tokenizer",
            "vllm_config",
        ),
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        CALLS,
        "is replaced on the engine's client, which counts requests",
        positional=("self", "prompt", "sampling_params", "request_id"),
        keywords=("lora_request", "trace_headers"),
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.encode",
        CALLS,
        "is replaced on the engine's client, which counts requests",
        positional=("self", "prompt", "pooling_params", "request_id"),
        keywords=("lora_request", "trace_headers"),
    ),
    Seam(
        "vllm.tracing.otel",
        "extract_trace_context",
        SPANS,
        "the trace that a client names",
        positional=("headers",),
    ),
    Seam(
        "vllm.tracing.utils",
        "extract_trace_headers",
        "api/vllm/generation_header.py",
        "the trace that a client names",
        positional=("headers",),
    ),
    Seam(
        "vllm.tracing.utils",
        "SpanAttributes",
        SPANS,
        "how vLLM's span names its request",
        attributes=("GEN_AI_REQUEST_ID",),
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.collective_rpc",
        ENGINE_WATCH,
        "asks the workers",
        positional=("self", "method"),
        keywords=("args",),
    ),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.check_health",
        ENGINE_WATCH,
        "whether the engine lives",
        positional=("self",),
    ),
    Seam("vllm.v1.engine.exceptions", "EngineDeadError", ENGINE_WATCH, "whether the engine lives"),
    Seam(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager",
        METRICS,
        "vLLM's metrics",
        attributes=("stat_loggers",),
    ),
    Seam(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger",
        METRICS,
        "a metric that is ended: it keeps a series for every set of adapters that ever ran",
        attributes=("gauge_lora_info",),
        markers=("if self.gauge_lora_info is not None",),
    ),
    Seam(
        "vllm.v1.metrics.prometheus",
        "get_prometheus_registry",
        METRICS,
        "vLLM's metrics",
        positional=(),
    ),
    Seam(
        "vllm.entrypoints.serve.utils.api_utils",
        "validate_json_request",
        "api/vllm/routes.py",
        "a body's content type, as on vLLM's routes",
        positional=("raw_request",),
    ),
    *RENDERING,
    *ENGINES,
    *ROUTED_EXPERTS,
)

SEAMS: tuple[Seam, ...] = (*LAUNCHER, *SERVER)


def check_version() -> None:
    """As `engine.vllm.compat.check_version`, of all that molehill uses of vLLM."""
    engine.check_version((*engine.SEAMS, *SEAMS))


def check_launcher() -> None:
    """Raises RuntimeError that names the first seam that has gone or changed."""
    seams.check(LAUNCHER, engine.installed_version())


def check_server() -> None:
    """As `check_launcher`, in the API server."""
    seams.check(SERVER, engine.installed_version())


def make_parser(parser: Any) -> Any:
    """`parser` with the options of `vllm serve`."""
    return seams.load(MAKE_PARSER)(parser)


def validate_arguments(args: Any) -> None:
    seams.load(VALIDATE_ARGUMENTS)(args)


def set_up_environment() -> None:
    seams.load(SET_UP_ENVIRONMENT)()


def replace_routes(app: FastAPI, core: Sequence[BaseRoute]) -> None:
    """Takes those of vLLM's routes, `core`, out of `app` that one added since replaces: of the same
    path, with all its methods. What was added goes in front: vLLM's mounts, as of /metrics, would
    answer first. vLLM leaves its routes there until 0.32, which does this itself."""
    kept = {id(route) for route in core}
    added = [route for route in app.router.routes if id(route) not in kept]
    replaced = {
        (route.path, method)
        for route in added
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    remaining = [
        route
        for route in core
        if not isinstance(route, APIRoute)
        or not {(route.path, method) for method in route.methods} <= replaced
    ]
    app.router.routes[:] = [*added, *remaining]
