"""vLLM's endpoint plugin: puts molehill's routes and registry into vLLM's API server."""

import asyncio
import logging
import multiprocessing
import os
import signal
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from molehill.api.adapters.background import Background
from molehill.api.adapters.chat import ChatReader
from molehill.api.adapters.events import LifecycleMetrics
from molehill.api.adapters.read_budget import MOST_AT_ONCE
from molehill.api.adapters.reader import AdapterReader
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.request_admission import RequestAdmission
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.source import local
from molehill.api.adapters.store import AdapterStore
from molehill.api.adapters.tasks import failure
from molehill.api.followers.followed_adapters import FollowedAdapters
from molehill.api.followers.lease_server import LeaseServer
from molehill.api.followers.messages import Welcome
from molehill.api.followers.owner import Owner
from molehill.api.http import adapters, dashboard, router_stats, unknown_model, vllm_routes
from molehill.api.http.auth import Guard
from molehill.api.http.dependencies import Services, answer_http_error
from molehill.api.http.following import FollowerServices, Following
from molehill.api.http.forwarding import Forwarder
from molehill.api.http.limit_refusals import LimitRefusals
from molehill.api.http.request_fields import RequestFields
from molehill.api.http.unix_server import UnixServer
from molehill.api.metrics.worker_stats import WorkerStats
from molehill.api.sources.adapters_file import LABEL
from molehill.api.sources.desired_state import DesiredStateReconciler
from molehill.api.sources.fetch import Sources
from molehill.api.sources.manifest import Manifest
from molehill.api.sources.operator_file import OperatorFile
from molehill.api.sources.restore import Restore
from molehill.api.sources.roots import AdapterRoots, operator_source
from molehill.api.sources.uploads import Uploads
from molehill.api.sources.watcher import Watcher
from molehill.api.vllm import compat, starting
from molehill.api.vllm.adapter_chats import (
    answer_as_adapters_do,
    base_chat,
    render_as_adapters_do,
)
from molehill.api.vllm.adapter_tokenizers import AdapterTokenizers
from molehill.api.vllm.api_processes import keeps_answers
from molehill.api.vllm.engine_metrics import drop_adapter_sets
from molehill.api.vllm.engine_watch import EngineWatch
from molehill.api.vllm.generation_header import GenerationHeader
from molehill.api.vllm.leased_calls import wrap_engine_client
from molehill.api.vllm.log_records import name_requests
from molehill.api.vllm.lora_requests import FollowedRequests, ServedRequests, make_request
from molehill.api.vllm.options import ApiProcess, Options, api_keys
from molehill.api.vllm.probe import Prober
from molehill.api.vllm.request_engines import Placements
from molehill.api.vllm.routed_calls import RoutingMemory, routing_memory
from molehill.api.vllm.routed_experts import RoutedExperts
from molehill.api.vllm.served_models import ServedModels, ServedPaths
from molehill.api.vllm.spans import Spans, spans_of
from molehill.api.vllm.token_bounds import TokenBounds
from molehill.api.vllm.worker_client import WorkerClient
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.system import startup
from molehill.engine.vllm import protocol
from molehill.engine.vllm.settings import Settings

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")


class MolehillRoutes:
    """Found by vLLM through the entry point `vllm.endpoint_plugins`."""

    name = "molehill"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Replaces vLLM's routes of the same path and method, and guards all of them."""
        name_requests()
        self._app = app
        args = app.state.args
        options = options_of(args)
        app.add_exception_handler(HTTPException, answer_http_error)
        for kind in unknown_model.RAISED:
            app.add_exception_handler(kind, unknown_model.answer_unknown_model)
        if options.follows:
            # All other routes are the owner's.
            app.add_middleware(LimitRefusals)
            app.add_middleware(Following)
        else:
            attach_routes(app)
            app.add_middleware(LimitRefusals)
            app.add_middleware(RequestFields)
        # The last one added is the outermost.
        app.add_middleware(GenerationHeader)
        app.add_middleware(
            Guard,
            keys=api_keys(args.api_key),
            admin_keys=options.admin_keys,
            trainers=options.trainer_control,
        )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Sets up the registry and loads the start adapters, before the server listens.

        Raises RuntimeError where the engine is not molehill's, ManifestError, LockedError, and for
        a start adapter AdapterError or RequestError; the server then does not start.
        """
        if engine_client is None:
            raise RuntimeError("molehill needs an engine; this server only renders prompts")
        compat.check_version()
        compat.check_server()
        options = options_of(args)
        models = state.openai_serving_models
        if models.lora_requests:
            raise RuntimeError("adapters were loaded past molehill; use molehill serve --adapter")
        if options.follows:
            await follow(engine_client, state, options)
            return
        models.lora_requests = ServedRequests()
        services = await make_services(engine_client, state, options)
        state.molehill = services
        layouts, non_granular = dict(options.layouts), dict(options.non_granular)
        for name, path in options.adapters:
            startup.enter(f"loading adapter {name}")
            source = operator_source(
                path, layouts.get(name), name in options.residuals, non_granular.get(name)
            )
            await services.registry.load(name, str(path), local(source))
        # Held by the state, or it would be collected while it runs.
        background = run_background(services, watch=options.watch)
        state.molehill_task = start(background, several=options.process is not None)
        await starting.hand_over()
        if options.process is not None:
            state.molehill_followed = await be_followed(self._app, services, options.process)


def attach_routes(app: FastAPI) -> None:
    """Of the process that owns the registry."""
    core = list(app.router.routes)
    # First: an adapter's name may have slashes, so that its own route would match too.
    app.include_router(router_stats.router)
    app.include_router(dashboard.router)
    app.include_router(vllm_routes.router)
    app.include_router(vllm_routes.loading)
    app.include_router(adapters.loading)
    app.include_router(adapters.router)
    compat.replace_routes(app, core)


async def be_followed(app: FastAPI, services: Services, process: ApiProcess) -> Any:
    """From here on other processes answer clients too. What has to be held as long as they do."""
    serving = await UnixServer(app, process.app).start()
    leases = LeaseServer(services.registry, services.welcome)
    await leases.listen(process.leases)
    return serving, leases


async def follow(engine_client: Any, state: Any, options: Options) -> None:
    """Sets up a process without a registry, once the owner's is ready. Raises RuntimeError for a
    model that is asked over websockets, which are not forwarded."""
    assert options.process is not None, "it follows another"
    if "realtime" in await engine_client.get_supported_tasks():
        raise RuntimeError("--api-server-count: found a model of /v1/realtime, expected another")
    models = state.openai_serving_models
    owner = await Owner.connect(options.process.leases)
    bounds = TokenBounds(owner.welcome.num_tokens, owner.welcome.extra_tokens)
    followed = FollowedAdapters(owner, make_request, engine_client.is_paused)
    wrap_engine_client(engine_client, followed, spans=await spans_of(engine_client), bounds=bounds)
    tokenizers = AdapterTokenizers(state.online_renderer.renderer.tokenizer)
    read_and_write_as_adapters_do(engine_client, state, followed, tokenizers)
    drop_adapter_sets(engine_client)
    names = {path.name for path in models.base_model_paths}
    models.lora_requests = FollowedRequests(followed)
    models.base_model_paths = shown = ServedPaths(models.base_model_paths, ())
    owners = ("/invocations", *(["/v1/responses"] if keeps_answers() else []))
    forward = Forwarder(options.process.app)
    state.molehill = FollowerServices(followed, forward, names, shown, owners)
    state.molehill_task = asyncio.create_task(end_after(owner, forward))


async def end_after(owner: Owner, forward: Forwarder) -> None:
    """Without the owner there is no server, and vLLM ends one only for a process that failed."""
    try:
        await owner.gone.wait()
        logger.warning("molehill: the process that owns the registry has gone; this one ends")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        # Before the event loop's end.
        await forward.close()


def start(background: Coroutine[Any, Any, None], *, several: bool = False) -> asyncio.Task[None]:
    """Ends the server if it fails: one that will never be ready, or serves nothing new, is better
    started again by whoever watches it. several: of its processes, which the one that started them
    ends together."""
    task = asyncio.create_task(background)
    starter = multiprocessing.parent_process() if several else None
    ended = os.getpid() if starter is None or starter.pid is None else starter.pid
    task.add_done_callback(partial(end_with, ended))
    return task


def end_with(process: int, task: asyncio.Task[None]) -> None:
    error = failure(task)
    if error is not None:
        logger.critical("What goes on beside requests failed; the server ends", exc_info=error)
        # As from outside: what runs is finished, as far as the server's time for that goes.
        os.kill(process, signal.SIGTERM)


async def run_background(services: Services, *, watch: bool) -> None:
    """What goes on while the server serves."""
    await services.restore.run()
    followed: list[Coroutine[Any, Any, None]] = []
    if services.adapters_file is not None:
        followed.append(services.adapters_file.run())
    if watch:
        watcher = Watcher(services.sources.roots, services.sources, services.registry)
        followed.append(watcher.run())
    await asyncio.gather(*followed)


def options_of(args: Namespace) -> Options:
    options: Options = getattr(args, "molehill", Options())
    return options


async def make_services(engine_client: Any, state: Any, options: Options) -> Services:
    """All that the routes need, on this engine. Raises RuntimeError, ManifestError, LockedError."""
    config, models = engine_client.vllm_config, state.openai_serving_models
    engines = config.parallel_config.data_parallel_size
    workers = EngineWatch(engine_client, engines, options.straggler_seconds)
    # The workers check against these too; here a bad adapter gets its own error.
    limits = Settings.from_config(config.additional_config).limits
    described = await base_model(workers)
    names = [path.name for path in models.base_model_paths]
    base = replace(described, name=names[0], source=described.name)
    reader = AdapterReader(base, limits, {config.model_config.model, *names})
    store = open_store(options)
    spans = await spans_of(engine_client)
    cores = await workers_cores(workers)
    tokenizers = AdapterTokenizers(state.online_renderer.renderer.tokenizer)
    read_chat = chat_reader(state.online_renderer, tokenizers)
    registry = AdapterRegistry(
        residency=Residency(
            WorkerClient(workers), config.lora_config.max_loras, LifecycleMetrics()
        ),
        read=reader,
        store=store,
        make_request=make_request,
        served=models.lora_requests,
        base_models=set(names),
        admission=options.admission,
        probe=await prober(engine_client, base.num_tokens, spans) if options.probe else None,
        merged_base=options.merged_base,
        background=Background(cores, threads=MOST_AT_ONCE),
        memory=limits.adapter_bytes,
        combine=reader.combine,
        read_chat=read_chat if options.adapter_chat_templates else None,
        num_tokens=base.num_tokens,
        paused=engine_client.is_paused,
    )
    models.lora_requests.registry = registry
    memory = routing_memory(config, options.routing_bytes, options.capture_routing)
    routed_experts = experts_of_mixtures(config, memory) if options.routed_experts else None
    placements = Placements(engine_client, workers)
    bounds = TokenBounds(base.num_tokens, base.extra_tokens)
    wrap_engine_client(engine_client, registry, placements, memory, routed_experts, spans, bounds)
    read_and_write_as_adapters_do(engine_client, state, registry, tokenizers)
    drop_adapter_sets(engine_client)
    roots = AdapterRoots(options.roots)
    sources = Sources(roots, options.hub, options.url_prefixes, limits.adapter_bytes)
    manifest = None if options.store is None else Manifest(store.root)
    return Services(
        registry=registry,
        sources=sources,
        uploads=Uploads(store, options.admission),
        stats=WorkerStats(workers, registry),
        restore=Restore(registry, store, sources, reader, manifest),
        models=ServedModels(models, registry),
        scraping=Background(cores, "molehill-metrics"),
        adapters_file=reconciler(options, sources, registry),
        routed_experts=routed_experts,
        welcome=Welcome(base.num_tokens, base.extra_tokens),
    )


def read_and_write_as_adapters_do(
    engine_client: Any, state: Any, registry: RequestAdmission, tokenizers: AdapterTokenizers
) -> None:
    """Prompts and answers have their adapters' templates and tokens."""
    models, tokenization = state.openai_serving_models, state.serving_tokenization
    render_as_adapters_do(state.online_renderer, models, registry, tokenizers, tokenization)
    answer_as_adapters_do(engine_client.output_processor, registry, tokenizers)


def experts_of_mixtures(config: Any, memory: RoutingMemory) -> RoutedExperts:
    """Raises RuntimeError where nothing can be told of routing."""
    memory.check()
    return RoutedExperts(config.model_config.get_total_num_hidden_layers())


def open_store(options: Options) -> AdapterStore:
    """Raises LockedError."""
    # One of several processes may be killed as the server stops.
    process = options.process
    store = AdapterStore(options.store, None if process is None else process.directory)
    if options.merged_base is not None:
        store.hold(options.merged_base.directory)
    return store


def reconciler(
    options: Options, sources: Sources, registry: AdapterRegistry
) -> DesiredStateReconciler | None:
    """None for a server that follows no adapters file."""
    if options.adapters_file is None:
        return None
    file = OperatorFile(options.adapters_file, LABEL)
    return DesiredStateReconciler(file, sources, registry)


def chat_reader(online_renderer: Any, tokenizers: AdapterTokenizers) -> ChatReader | None:
    """None for a model whose chats are not rendered by templates."""
    base = base_chat(online_renderer, tokenizers)
    return None if base is None else ChatReader(base)


async def prober(engine_client: Any, num_tokens: int | None, spans: Spans | None) -> Prober | None:
    """None for a model that does not generate, or may not show its log-probabilities. num_tokens:
    of its own vocabulary, where that is known."""
    tasks = await engine_client.get_supported_tasks()
    if "generate" not in tasks or engine_client.model_config.max_logprobs == 0:
        return None
    generate = engine_client.generate
    if engine_client.vllm_config.parallel_config.data_parallel_size > 1:
        # The base and the adapter are compared on one engine: others may round otherwise.
        generate = partial(generate, data_parallel_rank=0)
    return Prober(generate, num_tokens or engine_client.model_config.get_vocab_size(), spans)


async def workers_cores(workers: EngineWatch) -> set[int]:
    """What the workers compute on."""
    replies = await protocol.CORES.ask(workers, protocol.Empty())
    return {core for reply in replies for core in reply.cores}


async def base_model(workers: EngineWatch) -> BaseModel:
    """What the workers serve. Raises RuntimeError if they are not molehill's, or another
    release's."""
    try:
        replies = await protocol.DESCRIBE.ask(workers, protocol.Empty())
    except protocol.ProtocolError:
        raise
    except Exception as error:
        raise RuntimeError(
            "the workers do not know molehill; start with `molehill serve`, or give "
            "--worker-cls molehill.engine.vllm.worker.Worker --enable-lora"
        ) from error
    return replies[0]
