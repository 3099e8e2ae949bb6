"""A registry whose engine is a double: it remembers what it was asked for, and can be held back.

For orders of events that a real engine cannot be made to run.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.chat import ReadChat
from molehill.api.adapters.events import LifecycleMetrics
from molehill.api.adapters.generation import Loaded
from molehill.api.adapters.installer import Paused, Probe
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.read_budget import ReadBudget
from molehill.api.adapters.registry import AdapterRegistry, never_paused
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.source import Source, local
from molehill.api.adapters.store import AdapterStore
from molehill.api.vllm.leased_calls import wrap_engine_client
from molehill.api.vllm.lora_requests import make_request
from molehill.api.vllm.spans import Spans
from molehill.api.vllm.worker_client import WorkerClient
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import AdapterNotFoundError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.vllm import protocol
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant

ADMISSION = AdmissionLimits(adapters=5, loads=4)


def adapter(seed: int) -> Adapter:
    pair = Experts(torch.full((1, 4), float(seed)), torch.ones(4, 1), (1,))
    return Adapter("lora", {"layers.0.self_attn.q_proj": LinearMixture(pair, Constant((1.0,)))})


class Output(str):
    """What the engine gives: text, and whether it is the last of its request."""

    finished = False


def last(text: str) -> Output:
    output = Output(text)
    output.finished = True
    return output


class FakeEngine:
    """Remembers what vLLM's engine client was asked for; answers can be held back or refused."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.calls: list[tuple[str, int]] = []
        self.refusal = ""
        self.capacity = 100
        self.proceed = asyncio.Event()
        self.proceed.set()
        self.more = asyncio.Event()
        self.served: list[int] = []
        self.traced: list[Mapping[str, str] | None] = []
        self.kept: list[int] = []
        self.host = 100
        # Ids of adapters that the workers are not done with reading.
        self.slow: set[int] = set()
        self.begun: list[int] = []
        # Of installs that find no room beside what is loaded, by id.
        self.large: set[int] = set()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """One worker's answer, on the wire."""
        handlers: list[tuple[protocol.Rpc[Any, Any], Callable[[Any], Any]]] = [
            (protocol.UNINSTALL, self._uninstall),
            (protocol.PREPARE, self._prepare),
            (protocol.PREPARED, self._prepared),
            (protocol.DISCARD, self._discard),
            (protocol.INSTALL, self._install),
        ]
        if method == protocol.INSTALL.method:
            request = protocol.from_wire(args[0], protocol.InstallRequest, "the API")
            self.calls.append(("install", request.lora_int_id))
            await self.proceed.wait()
        (answer,) = (rpc.serve(args[0], run) for rpc, run in handlers if rpc.method == method)
        return [answer]

    def _uninstall(self, request: protocol.UninstallRequest) -> protocol.UninstallReply:
        lora_int_id = request.lora_int_id
        installed = lora_int_id in self.loaded
        self.kept = [other for other in self.kept if other != lora_int_id or request.keep]
        self.kept += [lora_int_id] * (request.keep and installed)
        over = max(0, len(self.kept) - self.host)
        evicted, self.kept = self.kept[:over], self.kept[over:]
        self.calls.append(("uninstall", lora_int_id))
        self.loaded.pop(lora_int_id, None)
        return protocol.UninstallReply(lora_int_id in self.kept, tuple(evicted))

    def _prepare(self, request: protocol.AdapterRequest) -> protocol.PrepareReply:
        assert (Path(request.path) / "molehill.json").exists()
        if request.lora_int_id not in self.kept:
            self.begun.append(request.lora_int_id)
        return protocol.PrepareReply(request.lora_int_id not in self.kept)

    def _prepared(self, request: protocol.AdapterRequest) -> protocol.PreparedReply:
        return protocol.PreparedReply(request.lora_int_id not in self.slow)

    def _discard(self, request: protocol.AdapterRequest) -> protocol.Empty:
        self.calls.append(("discard", request.lora_int_id))
        return protocol.Empty()

    def _install(self, request: protocol.InstallRequest) -> protocol.InstallReply:
        lora_int_id = request.lora_int_id
        if len(self.loaded) >= self.capacity or (lora_int_id in self.large and self.loaded):
            return protocol.InstallReply("memory", full=True)
        if not self.refusal:
            self.loaded[lora_int_id] = request.name
            self.kept = [other for other in self.kept if other != lora_int_id]
        return protocol.InstallReply(self.refusal)

    async def generate(
        self,
        prompt: str,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        trace_headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[str, None]:
        self.traced.append(trace_headers)
        self.served.append(lora_request.lora_int_id if lora_request else 0)
        yield Output("first")
        await self.more.wait()
        assert lora_request is None or lora_request.lora_int_id in self.loaded
        yield last("last")

    encode = generate


class World:
    """A registry on a fake engine, whose adapters are files that hold a number."""

    def __init__(
        self,
        folder: Path,
        slots: int = 4,
        admission: AdmissionLimits = ADMISSION,
        probe: Probe | None = None,
        read_chat: ReadChat | None = None,
        paused: Paused = never_paused,
        clock: Callable[[], float] = time.monotonic,
        spans: Spans | None = None,
    ) -> None:
        self.folder = folder
        self.limits = Limits()
        self.layouts: list[Layout | None] = []
        self.residuals: list[bool] = []
        self.non_granular: list[int | None] = []
        self.engine = FakeEngine()
        self.store = AdapterStore(folder / "store")
        self.served: dict[str, LoRARequest] = {}
        self.residency = Residency(WorkerClient(self.engine), slots, LifecycleMetrics())
        self.registry = AdapterRegistry(
            self.residency,
            self.read,
            self.store,
            make_request,
            self.served,
            base_models={"base"},
            admission=admission,
            probe=probe,
            read_chat=read_chat,
            paused=paused,
            clock=clock,
        )
        wrap_engine_client(self.engine, self.registry, spans=spans)

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        self.layouts.append(lora_b_layout)
        self.residuals.append(base_is_residual)
        self.non_granular.append(non_granular_after)
        if not path.exists():
            raise AdapterNotFoundError(path, "nothing", "a file")
        if (path / native.CONFIG).exists():
            return native.read(path, self.limits)
        return adapter(int(path.read_text()))

    def source(self, seed: int) -> Source:
        path = self.folder / f"adapter-{seed}"
        path.write_text(str(seed))
        return Source(path, f"label-{seed}")

    async def load(self, name: str, seed: int | Source, **options: Any) -> Loaded:
        """Other weights are refused unless the options say `replace`."""
        source = seed if isinstance(seed, Source) else self.source(seed)
        wanted = LoadOptions(**{"replace": False, **options})
        return await self.registry.load(name, source.label, local(source), wanted)

    def in_store(self) -> list[str]:
        return sorted(path.name for path in self.store.root.iterdir())

    def generate(self, name: str) -> AsyncGenerator[str, None]:
        return self.engine.generate("p", None, "id", lora_request=self.served[name])


Scenario = Callable[[World], Awaitable[None]]


Play = Callable[[Scenario], None]


async def let_tasks_run() -> None:
    """Lets all that can run, run."""
    for _ in range(50):
        await asyncio.sleep(0.001)


def is_reading(reading: ReadBudget) -> bool:
    """Whether any adapter is read now."""
    return bool(reading._taken)
