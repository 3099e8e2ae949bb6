"""The routes that molehill puts in the place of vLLM's, and the one that says it is ready."""

from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.tasks import failure
from molehill.api.http import errors, schemas
from molehill.api.http.dependencies import (
    CHANGES,
    LOADS,
    ErrorBody,
    Injected,
    StrictRoute,
    VllmBody,
    refusals,
)
from molehill.api.metrics import prometheus
from molehill.api.metrics.desired import DesiredCollector
from molehill.api.metrics.engines import EngineCollector
from molehill.api.vllm import engine_metrics
from molehill.api.vllm.engine_watch import is_alive
from molehill.api.vllm.routes import json_only

# What vLLM's clients may ask with parameters that only other servers know.
router = APIRouter()
loading = APIRouter(route_class=StrictRoute)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoadRequest(VllmBody):
    """vLLM's fields. `is_3d_lora_weight` has no meaning here, so only its default is taken."""

    route = LOAD
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadRequest(VllmBody):
    """vLLM takes, and ignores, an id beside the name; here the name alone decides."""

    route = UNLOAD
    lora_name: str
    lora_int_id: int | None = None


@loading.post(LOAD, dependencies=json_only, responses=refusals(*LOADS))
async def load_adapter(body: LoadRequest, services: Injected) -> Response:
    """200 means that the adapter serves."""
    fetch = services.sources.fetch_for_vllm(body.lora_path)
    options = LoadOptions(replace=body.load_inplace)
    loaded = await services.registry.load(body.lora_name, body.lora_path, fetch, options)
    return JSONResponse({"status": loaded.status, **summary(loaded.generation)})


@loading.post(UNLOAD, dependencies=json_only, responses=refusals(*CHANGES, 404, 409))
async def unload_adapter(body: UnloadRequest, services: Injected) -> Response:
    """200 means that no new request gets the adapter; running ones finish on it."""
    generation = await services.registry.unload(body.lora_name)
    running = {"requests_in_flight": generation.status.in_flight}
    return JSONResponse({"status": "unloaded", **summary(generation), **running})


def summary(generation: Generation) -> dict[str, Any]:
    chat = schemas.chat_info(generation.content)
    return {
        "lora_name": generation.name,
        "kind": generation.content.kind,
        "digest": generation.digest,
        "bytes": generation.content.num_bytes,
        "chat": None if chat is None else chat.model_dump(),
        "warnings": list(generation.content.warnings),
    }


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)
async def list_models(services: Injected) -> Response:
    """The base model and the adapters."""
    return JSONResponse({"object": "list", "data": await services.models.cards()})


@router.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody}})
async def show_model(name: str, services: Injected) -> Response:
    """One of the list's entries, or the base model by a name that is not listed."""
    return JSONResponse(await services.models.card(name))


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(services: Injected) -> Response:
    """vLLM's metrics and molehill's."""
    snapshot = await services.stats.refresh()
    collectors: list[Collector] = [
        prometheus.AdapterCollector(services.registry, snapshot),
        EngineCollector(snapshot.engines),
        services.registry.events,
    ]
    if services.adapters_file is not None:
        collectors.append(DesiredCollector(services.adapters_file))

    def text() -> bytes:
        return engine_metrics.exposition() + prometheus.exposition(*collectors)

    return Response(await services.scraping.run(text), media_type=CONTENT_TYPE_LATEST)


@router.get("/health/ready", response_class=Response, responses={503: {}})
async def show_ready(services: Injected, request: Request) -> Response:
    """200 once all that an earlier server remembered is loaded or reported, and all that the
    adapters file wants serves or has been refused for what it is, 503 until then, and 503 for good
    when the engine is dead, or when what goes on beside requests has failed, which the answer then
    says."""
    if not await is_alive(request.app.state.engine_client):
        return Response(status_code=503)
    task = getattr(request.app.state, "molehill_task", None)
    error = failure(task) if task is not None and task.done() else None
    if error is not None:
        # Its message is for the operator alone.
        message = f"found {type(error).__name__} in the background; see the server's log"
        body = errors.body(message, "internal_error", HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse(body, status_code=503)
    if services.restore.ready and (services.adapters_file is None or services.adapters_file.ready):
        return Response(status_code=200)
    return Response(status_code=503, headers={"Retry-After": "1"})
