"""molehill's own routes: adapters by name, with their generation."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field, PlainValidator, ValidationError, field_validator

from molehill.api.adapters.chat import ChatTemplate
from molehill.api.adapters.errors import (
    BadLimitsError,
    BadMixError,
    BadPathError,
    NotLoadedError,
)
from molehill.api.adapters.generation import Loaded
from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.load_options import AnyGeneration, Expected, LoadOptions
from molehill.api.adapters.mix import check_weights
from molehill.api.adapters.mix import shown as written
from molehill.api.adapters.source import Source, local
from molehill.api.adapters.traffic_limits import TrafficLimits, check_limits
from molehill.api.http import schemas
from molehill.api.http.dependencies import (
    CHANGES,
    LOADS,
    Handler,
    Injected,
    Services,
    StrictBody,
    StrictRoute,
    refusals,
)
from molehill.api.http.dependencies import services as services_of
from molehill.api.http.schemas import AdapterDetails, AdapterInfo, AdapterList, LoadedInfo
from molehill.api.http.uploads import document_upload, is_form, received
from molehill.api.sources.uploads import UPLOAD
from molehill.api.vllm.generation_header import HEADER
from molehill.api.vllm.routes import json_only
from molehill.engine.adapter.layout import Layout

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=StrictRoute)


class LoadRoute(StrictRoute):
    """Takes an adapter's own files in a form, too. (vLLM keeps one route of a path and method.)"""

    def unguarded(self) -> Handler:
        load_named = super().unguarded()

        async def load(request: Request) -> Response:
            return await (load_uploaded(request) if is_form(request) else load_named(request))

        return load


loading = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=LoadRoute)


def limits_of_text(text: str) -> TrafficLimits:
    """Of a form's field, which is JSON. Raises BadLimitsError."""
    try:
        return check_limits(json.loads(text))
    except (ValueError, RecursionError):
        raise BadLimitsError(f"limits: found {written(text)}, expected JSON") from None


# None where the field is left out.
Limits = Annotated[
    TrafficLimits | None,
    PlainValidator(check_limits, json_schema_input_type=dict[str, float | str | None] | None),
]


class LoadFields(StrictBody):
    """name: what clients ask for. pinned: never take it out of the workers; left out, it stays as
    it is. expected_generation: load only if the name serves this generation now, null: only if it
    serves none. allow_noop: serve it even if it does not change the base model's answers.
    lora_b_layout: of LoRA on fused experts whose files do not say it. base_is_residual: the served
    base is the one that PiSSA, LoftQ and the like trained the adapter beside. non_granular_after:
    of an X-LoRA, how many tokens of an answer get scalings of their own; null: all.
    when_not_invoked: what becomes of a prompt without an activated adapter's tokens; left out, it
    stays as it is, which is "refuse" at first. chat_template: whose template and special tokens its
    chats get; the adapter's only where it has files with others. limits: of its traffic, null for
    none; left out, they stay as they are.
    """

    name: str
    pinned: bool | None = None
    expected_generation: str | None = None
    allow_noop: bool = False
    lora_b_layout: Layout | None = None
    base_is_residual: bool = False
    non_granular_after: Annotated[int, Field(ge=0)] | None = None
    when_not_invoked: WhenNotInvoked | None = None
    chat_template: ChatTemplate = "adapter"
    limits: Limits = None

    def options(self) -> LoadOptions:
        given = "expected_generation" in self.model_fields_set
        expected: Expected = self.expected_generation if given else AnyGeneration
        return LoadOptions(
            expected=expected,
            pinned=self.pinned,
            allow_noop=self.allow_noop,
            when_not_invoked=self.when_not_invoked,
            chat_template=self.chat_template,
            limits=self.limits,
        )


class LoadBody(LoadFields):
    """source: a path below an adapter root, `hf://OWNER/NAME[@REVISION]` or a URL. mix: instead of
    a source, weights by the names of served adapters, whose sum it is. Other fields: see
    LoadFields.
    """

    source: str | None = None
    mix: dict[str, float] | None = None


class UploadFields(LoadFields):
    """The fields of a form beside an adapter's files, as text; an empty expected_generation is
    null. limits: as JSON."""

    limits: Annotated[
        TrafficLimits | None, PlainValidator(limits_of_text, json_schema_input_type=str)
    ] = None

    @field_validator("expected_generation")
    @classmethod
    def _none_where_empty(cls, value: str | None) -> str | None:
        return value or None


class PinBody(StrictBody):
    pinned: bool = True


def shown(info: AdapterInfo, **fields: Any) -> Response:
    headers = {} if info.generation is None else {HEADER: info.generation}
    return JSONResponse({**info.model_dump(), **fields}, headers=headers)


@router.get("", response_model=AdapterList, responses=refusals())
async def list_adapters(services: Injected) -> Response:
    """Every adapter: served, loading, draining and failed ones; and how far what serves is what the
    adapters file wants."""
    data = list(schemas.everything(services.registry))
    file = services.adapters_file
    desired = None if file is None else schemas.of_adapters_file(file)
    return JSONResponse(AdapterList(data=data, desired=desired).model_dump())


@loading.post(
    "",
    response_model=LoadedInfo,
    dependencies=json_only,
    responses=refusals(*LOADS, 408, 413),
    openapi_extra=document_upload(UploadFields),
)
async def load_adapter(body: LoadBody, services: Injected) -> Response:
    """Loads or replaces. 200 means that the adapter serves; the same bytes again change nothing. A
    form (multipart/form-data) brings the adapter's own files in place of a source."""
    loaded = await (load_source(body, services) if body.mix is None else load_mix(body, services))
    return shown(schemas.of_generation(services.registry, loaded.generation), status=loaded.status)


async def load_uploaded(request: Request) -> Response:
    """See load_adapter."""
    services = services_of(request)
    with services.registry.events.refusals():
        services.registry.loads.check_not_busy()
    async with received(request, services) as (fields, directory):
        form = parsed(fields)
        source = Source(
            directory,
            f"{UPLOAD}{form.name}",
            lora_b_layout=form.lora_b_layout,
            base_is_residual=form.base_is_residual,
            non_granular_after=form.non_granular_after,
        )
        loaded = await services.registry.load(
            form.name, source.label, local(source), form.options()
        )
    return shown(schemas.of_generation(services.registry, loaded.generation), status=loaded.status)


def parsed(fields: Mapping[str, str]) -> UploadFields:
    """Raises RequestValidationError, as FastAPI does for a JSON body."""
    try:
        return UploadFields.model_validate_strings(dict(fields))
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in found]
        ) from None


async def load_source(body: LoadBody, services: Services) -> Loaded:
    if body.source is None:
        raise BadPathError("source: found nothing, expected a source or a mix")
    fetch = services.sources.fetch(
        body.source, body.lora_b_layout, body.base_is_residual, body.non_granular_after
    )
    return await services.registry.load(body.name, body.source, fetch, body.options())


async def load_mix(body: LoadBody, services: Services) -> Loaded:
    fields = {
        "source": body.source,
        "lora_b_layout": body.lora_b_layout,
        "base_is_residual": body.base_is_residual or None,
        "non_granular_after": body.non_granular_after,
    }
    given = [name for name, value in fields.items() if value is not None]
    if given:
        raise BadMixError(f"mix: found it beside {given[0]}, expected either")
    return await services.registry.load_mix(body.name, check_weights(body.mix), body.options())


@router.post(
    "/{name:path}/pin", response_model=AdapterInfo, responses=refusals(*CHANGES, 404, 409, 503)
)
async def pin_adapter(name: str, services: Injected, body: PinBody = PinBody()) -> Response:  # noqa: B008
    """Keeps an adapter in the workers, or lets it be taken out when it is idle."""
    generation = await services.registry.pin(name, body.pinned)
    return shown(schemas.of_generation(services.registry, generation))


@router.get("/{name:path}", response_model=AdapterDetails, responses=refusals(404))
async def show_adapter(name: str, services: Injected) -> Response:
    """What the name serves, or how far its load is, or why it failed."""
    info = schemas.of_name(services.registry, name)
    if info is None:
        raise NotLoadedError.of(name)
    serving = services.registry.get(name)
    if serving is None:
        return shown(info, routing=None)
    shape = schemas.routing_shape(serving.content, services.routed_experts)
    return shown(info, routing=shape.model_dump())


@router.delete("/{name:path}", response_model=AdapterInfo, responses=refusals(*CHANGES, 404, 409))
async def delete_adapter(
    name: str, services: Injected, expected_generation: str | None = None
) -> Response:
    """Takes the name away; running requests finish, then the memory is freed. A name that failed or
    is not loaded again yet is forgotten."""
    absent = await services.registry.dismiss(name)
    if absent is not None:
        return shown(schemas.of_absent(absent))
    expected: Expected = AnyGeneration if expected_generation is None else expected_generation
    generation = await services.registry.unload(name, expected)
    return shown(schemas.of_generation(services.registry, generation))
