"""What routing does and costs, as JSON: all adapters, and one by layer and projection."""

from collections import Counter
from collections.abc import Mapping

from fastapi import APIRouter
from pydantic import BaseModel, Field

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.status import AdapterState
from molehill.api.http import schemas
from molehill.api.http.dependencies import Injected, StrictRoute, refusals
from molehill.api.http.schemas import AdapterInfo
from molehill.api.metrics.worker_stats import EngineStats, Snapshot
from molehill.engine.adapter.model import layer_of, natural_key, projection_of
from molehill.engine.routing_stats import RoutingStats, SiteRoutingStats

router = APIRouter(tags=["adapters"], route_class=StrictRoute)


class RoutingInfo(BaseModel):
    """Since the load. Ratios are null before the first decision."""

    decisions: int = Field(description="Routing decisions: one token at one router.")
    experts_activated: int = Field(description="Experts that the decisions chose.")
    experts_per_decision: float | None
    soft_share: float | None = Field(description="Decisions that fell back to all experts.")
    mean_entropy: float | None = Field(description="Of the router, over its maximum.")
    imbalance: float | None = Field(
        description="Tokens of the busiest expert over the mean; of several routers their average."
    )
    flops_done: int = Field(description="Of routers and chosen experts; a multiply-add is two.")
    flops_avoided: int = Field(description="Of the experts that were not chosen.")


class SiteRouting(RoutingInfo):
    """One router, or one projection whose experts always all work."""

    site: str
    layer: int | None
    projection: str
    experts: int
    expert_tokens: list[int] = Field(description="Decisions that chose each expert.")
    expert_shares: list[float] | None = Field(description="The same over decisions.")


class AdapterRouting(BaseModel):
    """The current generation of an adapter, by layer and projection."""

    adapter: str
    generation: str
    kind: str
    tokens: int
    total: RoutingInfo
    sites: list[SiteRouting]


class AdapterSummary(BaseModel):
    """One adapter, over its generations. note: how far a load is, or why there is none."""

    adapter: str
    kind: str | None
    state: AdapterState
    note: str | None
    requests_in_flight: int
    resident_bytes: int = Field(description="In the slots of all workers.")
    tokens: int
    op_seconds: float = Field(description="Its part of the adapter ops' worker-seconds, by FLOPs.")
    total: RoutingInfo


class StepSecondsInfo(BaseModel):
    """Worker-seconds since the start."""

    steps: float = Field(description="Forward passes and sampling.")
    adapter_ops: float = Field(description="Adapter ops in them, of all adapters together.")


class EngineSummary(BaseModel):
    """One engine, of several with data parallelism."""

    engine: int = Field(description="Its data-parallel rank.")
    adapters: int = Field(description="Generations in the slots of its workers.")
    resident_bytes: int = Field(description="In the slots of its workers.")
    host_bytes: int = Field(description="In their host memory.")
    tokens: int = Field(description="That ran through adapters there.")


class Overview(BaseModel):
    """seconds: null where the workers cannot measure them, as on a GPU."""

    age_seconds: float = Field(description="Since the workers told these figures.")
    seconds: StepSecondsInfo | None
    adapters: list[AdapterSummary]
    engines: list[EngineSummary]


@router.get("/v1/routing", response_model=Overview, responses=refusals())
async def show_overview(services: Injected) -> Overview:
    """All adapters' traffic and routing cost."""
    snapshot = await services.stats.refresh()
    spent = snapshot.seconds
    return Overview(
        age_seconds=snapshot.age,
        seconds=StepSecondsInfo(steps=spent.steps, adapter_ops=spent.ops) if spent else None,
        adapters=summaries(services.registry, snapshot),
        engines=[engine_summary(*engine) for engine in snapshot.engines.items()],
    )


@router.get(
    "/v1/adapters/{name:path}/routing", response_model=AdapterRouting, responses=refusals(404)
)
async def show_routing(name: str, services: Injected) -> AdapterRouting:
    """One adapter's routing by layer and projection. 404 if it is not loaded."""
    generation = services.registry.names.current(name)
    tokens, sites = await services.stats.routing(generation.lora_int_id)
    return adapter_routing(generation, tokens, sites)


def summaries(registry: AdapterRegistry, snapshot: Snapshot) -> list[AdapterSummary]:
    """By name; a name stays while requests run on it. The first that is known of a name counts:
    what it serves, a load, a failure."""
    infos: dict[str, AdapterInfo] = {}
    for info in schemas.everything(registry):
        infos.setdefault(info.name, info)
    running = Counter[str]()
    for generation in registry.alive():
        running[generation.name] += generation.status.in_flight
    return [
        AdapterSummary(
            adapter=name,
            kind=info.kind,
            state=info.state,
            note=info.stage or info.error or info.source_note,
            requests_in_flight=running[name],
            resident_bytes=snapshot.resident_bytes.get(name, 0),
            tokens=stats.tokens,
            op_seconds=stats.op_seconds,
            total=routing_of(stats),
        )
        for name, info in sorted(infos.items())
        for stats in [snapshot.stats.get(name, RoutingStats())]
    ]


def engine_summary(rank: int, engine: EngineStats) -> EngineSummary:
    return EngineSummary(
        engine=rank,
        adapters=engine.adapters,
        resident_bytes=sum(engine.resident_bytes.values()),
        host_bytes=sum(engine.host_bytes.values()),
        tokens=sum(stats.tokens for stats in engine.stats.values()),
    )


def routing_of(stats: RoutingStats) -> RoutingInfo:
    imbalance = stats.imbalance / stats.imbalanced if stats.imbalanced else None
    return _routing(stats, sum(stats.expert_tokens), imbalance)


def _routing(
    stats: RoutingStats | SiteRoutingStats, activated: int, imbalance: float | None
) -> RoutingInfo:
    decisions = stats.decisions
    return RoutingInfo(
        decisions=decisions,
        experts_activated=activated,
        experts_per_decision=activated / decisions if decisions else None,
        soft_share=stats.soft / decisions if decisions else None,
        mean_entropy=stats.entropy / decisions if decisions else None,
        imbalance=imbalance,
        flops_done=stats.flops_done,
        flops_avoided=stats.flops_avoided,
    )


def adapter_routing(
    generation: Generation, tokens: int, sites: Mapping[str, SiteRoutingStats]
) -> AdapterRouting:
    total = RoutingStats(tokens)
    for site in sites.values():
        total.add_site(site)
    return AdapterRouting(
        adapter=generation.name,
        generation=generation.digest,
        kind=generation.content.kind,
        tokens=tokens,
        total=routing_of(total),
        sites=[site_routing(site, sites[site]) for site in sorted(sites, key=natural_key)],
    )


def site_routing(site: str, stats: SiteRoutingStats) -> SiteRouting:
    chosen = stats.expert_tokens
    decisions = stats.decisions
    return SiteRouting(
        **vars(_routing(stats, sum(chosen), stats.imbalance)),
        site=site,
        layer=layer_of(site),
        projection=projection_of(site),
        experts=stats.experts,
        expert_tokens=list(chosen),
        expert_shares=[tokens / decisions for tokens in chosen] if decisions else None,
    )
