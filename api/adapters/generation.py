"""One version of one adapter, and what a read of its files leaves behind."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from molehill.api.adapters.errors import RequestError, encodable
from molehill.api.adapters.source import Source
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.model import Adapter
from molehill.engine.transform.static_gates import gate


@dataclass(frozen=True)
class Content:
    """What an adapter's files held; the tensors themselves lie at `path`, in the store.

    digest: sha256 of the bytes that were read, the generation's identity before clients.
    num_bytes: of the tensors in canonical float32. plan: sites by what they need when they run.
    """

    digest: str
    kind: str
    num_bytes: int
    warnings: tuple[str, ...]
    plan: Mapping[str, int]
    path: Path


def content_of(adapter: Adapter, path: Path) -> Content:
    """Counts static sites; merging them is up to the workers."""
    sites = adapter.sites.values()
    static = sum(gate(mixture).weights is not None for mixture in sites)
    summary = {"sites": len(sites), "static": static, "dynamic": len(sites) - static}
    return Content(adapter.digest, adapter.kind, adapter.num_bytes, adapter.warnings, summary, path)


@dataclass(eq=False)
class Generation:
    """One version of the weights behind a name. What it serves never changes.

    request: vLLM's LoRARequest, with an id that is never used again.
    created, last_used: Unix seconds. loads: how often it came into the workers.
    in_flight: requests admitted to it. retired: no new request may be.
    note: what has become of the source since, where that is known.
    check: what must still be made sure of when it first comes into the workers, or None; raises
    EngineRefusedError.

    Kept by Residency: resident: in the workers. running: admitted requests that the engine has.
    yielding: resident, but its next requests wait until others have had a turn. since: number of
    the turn that brought it in.
    """

    name: str
    content: Content
    source: Source
    request: Any
    pinned: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    last_used: float | None = None
    loads: int = 0
    in_flight: int = 0
    retired: bool = False
    note: str | None = None
    check: Callable[[], Awaitable[None]] | None = None
    resident: bool = False
    running: int = 0
    yielding: bool = False
    since: int = 0

    @property
    def digest(self) -> str:
        return self.content.digest

    @property
    def lora_int_id(self) -> int:
        number: int = self.request.lora_int_id
        return number


Stage = Literal["waiting", "fetching", "reading", "installing", "probing"]


@dataclass(eq=False)
class Loading:
    """A load on its way. stage: what it does now."""

    name: str
    source: str
    stage: Stage = "waiting"
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Failure:
    """A name that should serve and does not, and why: the error's type and message, for clients.

    Not the error itself: its traceback would keep what was read in memory.
    """

    name: str
    source: str
    kind: str
    message: str


def failure_of(name: str, source: str, error: Exception) -> Failure:
    if isinstance(error, RequestError | AdapterError):
        return Failure(name, source, error.kind, encodable(str(error)))
    # Its message is for the operator alone: it may hold paths of the server.
    return Failure(name, source, "internal_error", f"{type(error).__name__}; see the server's log")


@dataclass(frozen=True)
class Loaded:
    """What a load came to."""

    generation: Generation
    status: Literal["loaded", "replaced", "unchanged"]
