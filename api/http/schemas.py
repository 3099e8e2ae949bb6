"""An adapter as clients see it."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Literal

from pydantic import BaseModel

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Content, Failure, Generation, Loading
from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.mix import Mix
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import AdapterState
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits
from molehill.api.sources.desired_state import DesiredState, DesiredStateReconciler
from molehill.api.vllm.routed_experts import RoutedExperts
from molehill.engine.adapter.model import layer_of, projection_of

Resident = Literal["workers", "host", "disk"]
RESIDENT: dict[Tier, Resident] = {"worker": "workers", "host": "host", "disk": "disk"}


class Plan(BaseModel):
    """How many sites the adapter changes, and at how many its gate reads the token."""

    sites: int
    static: int
    dynamic: int


class MixPartInfo(BaseModel):
    """generation: what the name served when the mix was made."""

    name: str
    weight: float
    generation: str


class ChatInfo(BaseModel):
    """What an adapter's chats take of its files in place of the base's. templates: sha256 by name,
    default or tool_use. special_tokens: as templates see them. stop_token_ids: beside the base's.
    """

    templates: dict[str, str]
    special_tokens: dict[str, str]
    stop_token_ids: list[int]


class VocabularyInfo(BaseModel):
    """What an adapter has of its own on the vocabulary. rows: how many of the embedding and of the
    LM head, in the base's place or added, by site. added_tokens: ids after the base's own that its
    prompts or answers may hold. texts: of tokens that its tokenizer has beside the base's, by id.
    """

    rows: dict[str, int]
    added_tokens: list[int]
    texts: dict[int, str]


class RouterInfo(BaseModel):
    """One router. layer: null outside of the numbered ones. head: of one that decides head by head,
    else null. k: of its experts that one decision has at most."""

    site: str
    layer: int | None
    projection: str
    head: int | None
    experts: int
    k: int


class RoutedExpertsInfo(BaseModel):
    """What vLLM's `routed_experts` gives of each token: `dtype` `[layers, k]`. columns: of each
    router the first of its own k, in its layer's row. All null where `refusal` says why an answer
    has no such array."""

    shape: tuple[int, int] | None = None
    dtype: Literal["uint8", "uint16"] | None = None
    columns: list[int] | None = None
    refusal: str | None = None


class RoutingShape(BaseModel):
    """What `"molehill": {"routing": true}` gives of each token: int16 `[sites, k]`. sites: in that
    order. routed_experts: null on servers whose field is not the mixtures'."""

    k: int
    sites: list[RouterInfo]
    routed_experts: RoutedExpertsInfo | None = None


class LimitsInfo(BaseModel):
    """Of an adapter's traffic; null where there is none. tokens_per_second: of prompts and of what
    is generated. tenant_slots: of the workers, that the tenant's adapters may take."""

    requests_in_flight: int | None
    tokens_per_second: float | None
    tenant: str | None
    tenant_slots: int | None


class AdapterInfo(BaseModel):
    """One adapter. A name that is being replaced appears once for each generation.

    state: loading (stage says how far), serving, draining (replaced or unloaded, finishing its
    requests) or failed (error and error_type say why a remembered or watched adapter does not
    serve).
    wanted_by: adapters_file, command_line (--adapter), or null of what somebody loaded by a request
    or put into a watched root.
    generation: sha256 of the content. bytes: of its tensors in float32. resident: where it is: in
    the workers' slots (ready at once), in their host memory, or on disk (the next request waits for
    it, from disk for longer). last_used: Unix
    seconds. loads: how often it came into the workers. source_note: what has become of the source.
    alora_invocation_tokens: what activates it; null of an adapter that acts on every token.
    when_not_invoked: what becomes of a prompt without them. mix: of a mix of others, those.
    chat: how its chats differ from the base's; null where they do not. limits: of its traffic;
    null where there are none. vocabulary: rows and tokens of its own; null where it has none.
    """

    name: str
    state: AdapterState
    stage: str | None = None
    error: str | None = None
    error_type: str | None = None
    kind: str | None = None
    wanted_by: Literal["adapters_file", "command_line"] | None = None
    generation: str | None = None
    source: str
    source_note: str | None = None
    bytes: int | None = None
    resident: Resident | None = None
    pinned: bool = False
    requests_in_flight: int = 0
    created: int | None = None
    last_used: float | None = None
    loads: int = 0
    loading_seconds: float | None = None
    plan: Plan | None = None
    alora_invocation_tokens: list[int] | None = None
    when_not_invoked: WhenNotInvoked | None = None
    mix: list[MixPartInfo] | None = None
    chat: ChatInfo | None = None
    limits: LimitsInfo | None = None
    vocabulary: VocabularyInfo | None = None
    warnings: list[str] = []


class AdapterDetails(AdapterInfo):
    """One adapter, with its routers; null of a name that does not serve."""

    routing: RoutingShape | None = None


class DesiredInfo(BaseModel):
    """One entry of the adapters file. state: converged (the name serves what it says), pending (it
    is loaded, or will be) or failed (error and error_type say why; retry_seconds is the time until
    the next try, null where the file has to change first). generation: what the name serves now.
    """

    name: str | None
    state: DesiredState
    source: str | None
    generation: str | None
    error_type: str | None
    error: str | None
    retry_seconds: float | None


class DesiredList(BaseModel):
    """The adapters file. converged: the last look at it was good, and every entry of it is served.
    read: when it was last read and understood, Unix seconds. error, error_type: why the last look
    was in vain; what is listed is the last good one's."""

    converged: bool
    read: float | None
    error_type: str | None
    error: str | None
    data: list[DesiredInfo]


class AdapterList(BaseModel):
    """desired: what the adapters file wants, null for a server that follows none."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]
    desired: DesiredList | None = None


class LoadedInfo(AdapterInfo):
    """What a load came to: loaded, replaced (another generation), unchanged (the same), or
    limits_changed (the same, with other limits)."""

    status: Literal["loaded", "replaced", "unchanged", "limits_changed"]


def of_generation(registry: AdapterRegistry, generation: Generation) -> AdapterInfo:
    content, status = generation.content, generation.status
    return AdapterInfo(
        name=generation.name,
        state=status.state,
        kind=content.kind,
        wanted_by=wanted_by(status.source),
        generation=generation.digest,
        source=status.source.public,
        source_note=status.note,
        bytes=content.num_bytes,
        resident=RESIDENT[registry.residency.tier(generation)],
        pinned=status.slot.pinned,
        requests_in_flight=status.in_flight,
        created=generation.created,
        last_used=status.slot.last_used,
        loads=status.slot.loads,
        plan=Plan(**content.plan),
        alora_invocation_tokens=list(content.invocation_tokens) or None,
        when_not_invoked=status.when_not_invoked,
        mix=None if status.source.mix is None else mix_info(status.source.mix),
        chat=chat_info(content),
        limits=limits_info(status.traffic.limits),
        vocabulary=vocabulary_info(content),
        warnings=list(content.warnings),
    )


def routing_shape(content: Content, routed_experts: RoutedExperts | None) -> RoutingShape:
    sites = [
        RouterInfo(
            site=router.site,
            layer=layer_of(router.site),
            projection=projection_of(router.site),
            head=router.head,
            experts=router.experts,
            k=router.most,
        )
        for router in content.routers
    ]
    given = None if routed_experts is None else routed_experts_info(routed_experts, content)
    return RoutingShape(k=content.most_experts, sites=sites, routed_experts=given)


def routed_experts_info(given: RoutedExperts, content: Content) -> RoutedExpertsInfo:
    choices = given.choices(content)
    if isinstance(choices, str):
        return RoutedExpertsInfo(refusal=choices)
    return RoutedExpertsInfo(
        shape=(choices.layers, choices.k),
        dtype="uint8" if choices.dtype.itemsize == 1 else "uint16",
        columns=[router.column for router in choices.routers],
    )


def mix_info(mix: Mix) -> list[MixPartInfo]:
    return [MixPartInfo(**asdict(part)) for part in mix.parts]


def wanted_by(source: Source) -> Literal["adapters_file", "command_line"] | None:
    if not source.remembered:
        return "command_line"
    return "adapters_file" if source.desired else None


def of_adapters_file(file: DesiredStateReconciler) -> DesiredList:
    data = [DesiredInfo(**asdict(status)) for status in file.statuses()]
    error = file.error
    return DesiredList(
        converged=error is None
        and file.read_at is not None
        and all(info.state is DesiredState.CONVERGED for info in data),
        read=file.read_at,
        error_type=None if error is None else error.kind,
        error=None if error is None else error.message,
        data=data,
    )


def chat_info(content: Content) -> ChatInfo | None:
    shown = None if content.chat is None else content.chat.shown()
    return None if shown is None else ChatInfo(**shown)


def vocabulary_info(content: Content) -> VocabularyInfo | None:
    if not content.rows and not content.token_texts:
        return None
    return VocabularyInfo(
        rows=dict(content.rows),
        added_tokens=list(content.added.needed),
        texts={text.id: text.text for text in content.token_texts},
    )


def limits_info(limits: TrafficLimits) -> LimitsInfo | None:
    return None if limits == NO_LIMITS else LimitsInfo(**asdict(limits))


def of_loading(loading: Loading) -> AdapterInfo:
    return AdapterInfo(
        name=loading.name,
        state=loading.state,
        stage=loading.stage,
        source=loading.source,
        loading_seconds=time.time() - loading.started,
    )


def of_failure(failure: Failure) -> AdapterInfo:
    return AdapterInfo(
        name=failure.name,
        state=failure.state,
        wanted_by="adapters_file" if failure.desired else None,
        source=failure.source,
        error=failure.message,
        error_type=failure.kind,
    )


def of_absent(absent: Failure | Loading) -> AdapterInfo:
    """A name that should serve and does not, or not yet."""
    return of_failure(absent) if isinstance(absent, Failure) else of_loading(absent)


def everything(registry: AdapterRegistry) -> Iterator[AdapterInfo]:
    """Served names first, then mixes by request, and what is on its way in, out, or nowhere."""
    show = partial(of_generation, registry)
    yield from map(show, registry)
    yield from map(show, registry.mixes)
    yield from map(of_loading, registry.loading())
    yield from (show(other) for other in registry.alive() if other.status.draining)
    yield from map(of_failure, registry.failures.values())


def of_name(registry: AdapterRegistry, name: str) -> AdapterInfo | None:
    """What the name serves, else what is known of it."""
    current = registry.get(name)
    if current is not None:
        return of_generation(registry, current)
    return next((info for info in everything(registry) if info.name == name), None)
