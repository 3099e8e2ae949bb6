"""vLLM's endpoint plugin: puts molehill's routes and registry into vLLM's API server."""

import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from molehill.api import routes
from molehill.api.inflight import count_requests
from molehill.api.metrics import WorkerStats
from molehill.api.options import Options
from molehill.api.paths import AdapterRoots, operator_source
from molehill.api.registry import AdapterRegistry
from molehill.api.store import AdapterStore
from molehill.engine import formats, validation
from molehill.engine.adapter import Adapter
from molehill.engine.base import BaseModel, Limits, Moe
from molehill.engine.formats import native
from molehill.engine.merge import merge_static
from molehill.engine.vllm import compat
from molehill.engine.vllm.settings import Settings

logger = logging.getLogger("vllm.molehill")


class ServedRequests(dict[str, Any]):
    """Names to LoRARequests, as vLLM looks them up by a request's model.

    In chat, vLLM also goes through all values for an adapter *named* like a content part's type
    (`text`, `image`) and runs the base model's requests on it. It finds none here.
    """

    def values(self) -> Any:
        return {}.values()


class MolehillRoutes:
    """Found by vLLM through the entry point `vllm.endpoint_plugins`."""

    name = "molehill"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Replaces vLLM's routes of the same path and method."""
        app.include_router(routes.router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Sets up the registry and loads the start adapters, before the server listens.

        Raises RuntimeError where the engine is not molehill's, AdapterError and RequestError for a
        start adapter; the server then does not start.
        """
        if engine_client is None:
            raise RuntimeError("molehill needs an engine; this server only renders prompts")
        compat.check_version()
        options: Options = getattr(args, "molehill", Options())
        models = state.openai_serving_models
        if models.lora_requests:
            raise RuntimeError("adapters were loaded past molehill; use molehill serve --adapter")
        models.lora_requests = ServedRequests()
        # The workers check against these too; here a bad adapter gets its own error.
        limits = Settings.from_config(engine_client.vllm_config.additional_config).limits
        base = replace(await base_model(engine_client), name=models.base_model_paths[0].name)
        resident = options.resident
        registry = AdapterRegistry(
            engine=engine_client,
            read=partial(read, base=base, limits=limits),
            store=AdapterStore(options.store, partial(merge, base=base, options=options)),
            served=models.lora_requests,
            base_models={path.name for path in models.base_model_paths},
            resident=(resident.name, resident.digest) if resident else None,
        )
        count_requests(engine_client, registry)
        roots = AdapterRoots(options.roots)
        state.molehill = routes.Services(registry, roots, WorkerStats(engine_client), models)
        for name, path in options.adapters:
            await registry.load(name, operator_source(path))


def read(directory: Path, base: BaseModel, limits: Limits) -> Adapter:
    """Parses and validates. Raises AdapterError."""
    adapter = formats.read(directory, limits)
    validation.validate(adapter, base, limits)
    return adapter


def merge(adapter: Adapter, base: BaseModel, options: Options) -> Adapter:
    """The adapter as it is served."""
    resident = options.resident
    if resident and adapter.digest == resident.digest:
        # The very bits that the workers have in their weights.
        return native.read(resident.directory, options.limits)
    if not options.merge:
        return adapter
    merged, sites = merge_static(adapter, base, options.merge_tolerance)
    lossy = [site for site in sites if site.error]
    for site in lossy:
        logger.info("%s: experts merged with relative error %.3g", site.site, site.error)
    if sites:
        before, after = sum(s.rank_before for s in sites), sum(s.rank_after for s in sites)
        logger.info("Merged %d static sites: %d rank rows to %d", len(sites), before, after)
    return merged


async def base_model(engine_client: Any) -> BaseModel:
    """What the workers serve. Raises RuntimeError if they are not molehill's."""
    try:
        answers = await engine_client.collective_rpc("molehill_describe")
    except Exception as error:
        raise RuntimeError(
            "the workers do not know molehill; start with `molehill serve`, or give "
            "--worker-cls molehill.engine.vllm.worker.Worker --enable-lora"
        ) from error
    return parse_base(answers[0])


def parse_base(answer: Mapping[str, Any]) -> BaseModel:
    linears = {name: (shape[0], shape[1]) for name, shape in answer["linears"].items()}
    moes = {name: Moe(**sizes) for name, sizes in answer["moes"].items()}
    return BaseModel(
        answer["name"],
        answer["architecture"],
        linears,
        dict(answer["ffns"]),
        moes,
        dict(answer["refused"]),
    )
