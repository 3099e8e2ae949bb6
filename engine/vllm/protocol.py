"""The questions that the API side asks molehill's workers, and their answers.

vLLM carries plain values only, in the arguments of `collective_rpc` and in what it returns: a
message travels as `{"version": VERSION, "message": its fields}`. Both sides write and read it here,
so that what is of another shape or release is an error with a name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.routing_stats import RoutingStats, SiteRoutingStats

# One more whenever a message below, or a type in it, gets other fields.
VERSION = 3

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
MessageT = TypeVar("MessageT")


class ProtocolError(RuntimeError):
    """A message of another release of molehill, or of none."""


class Engine(Protocol):
    """What is asked of vLLM's engine client."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer per worker; raises with a worker's message."""


@dataclass(frozen=True)
class Rpc(Generic[RequestT, ReplyT]):
    """One question. method: of the worker, by its name."""

    method: str
    request: type[RequestT]
    reply: type[ReplyT]

    async def ask(self, engine: Engine, request: RequestT) -> list[ReplyT]:
        """One reply per worker. Raises ProtocolError, and what the engine raises."""
        return self.replies(await engine.collective_rpc(self.method, args=(to_wire(request),)))

    def replies(self, answers: Sequence[object]) -> list[ReplyT]:
        """Of what came over the wire, one per worker. Raises ProtocolError."""
        sender = f"{self.method}: a worker answered with"
        return [from_wire(answer, self.reply, sender) for answer in answers]

    def serve(self, argument: object, handler: Callable[[RequestT], ReplyT]) -> object:
        """A worker's answer to an argument that came over the wire. Raises ProtocolError, and what
        the handler raises."""
        request = from_wire(argument, self.request, f"{self.method}: the API server sent")
        return to_wire(handler(request))


def to_wire(message: object) -> object:
    """message: a dataclass of this module."""
    return {"version": VERSION, "message": msgspec.to_builtins(message)}


def from_wire(value: object, kind: type[MessageT], sender: str) -> MessageT:
    """Raises ProtocolError. sender: who sent it, for that error."""
    version = value.get("version") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or version != VERSION:
        what = "no version" if version is None else f"version {version!r}"
        raise ProtocolError(
            f"{sender} {what} of molehill's messages, expected version {VERSION}: "
            "all processes need the same release of molehill"
        )
    try:
        return msgspec.convert(value.get("message"), kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{sender} another {kind.__name__}: {error}") from error


@dataclass(frozen=True)
class Empty:
    """Nothing to ask with, or nothing to answer."""


@dataclass(frozen=True)
class CoresReply:
    """The CPU cores of its machine that the worker computes on, in order."""

    cores: tuple[int, ...]


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter of the store. path: of its canonical copy."""

    lora_int_id: int
    path: str


@dataclass(frozen=True)
class PrepareReply:
    """reads: whether the worker reads the adapter; it has it in host memory if not."""

    reads: bool


@dataclass(frozen=True)
class PreparedReply:
    """done: whether it is read, or was refused, which the reply to an install then says."""

    done: bool


@dataclass(frozen=True)
class InstallRequest:
    """name: as the adapter is served. For the rest see AdapterRequest."""

    name: str
    lora_int_id: int
    path: str


@dataclass(frozen=True)
class InstallReply:
    """refusal: why the adapter is in no slot; empty if it is in one. full: the refusal is for other
    adapters' memory, and can change."""

    refusal: str = ""
    full: bool = False


@dataclass(frozen=True)
class UninstallRequest:
    """keep: the adapter may come back, from host memory. For the rest see AdapterRequest."""

    lora_int_id: int
    path: str
    keep: bool


@dataclass(frozen=True)
class UninstallReply:
    """kept: whether the adapter is in host memory now. evicted: ids of what had to leave it since
    the last reply."""

    kept: bool
    evicted: tuple[int, ...]


@dataclass(frozen=True)
class StatsRequest:
    """known: ids that the API side may ask for again. Others that are out of the slots are reported
    for the last time."""

    known: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterReport:
    """One adapter on one worker. resident_bytes: None if it is in no slot. stats: over all its
    stays in a slot."""

    name: str
    resident_bytes: int | None
    stats: RoutingStats


@dataclass(frozen=True)
class StepSeconds:
    """Seconds in model steps and, within them, in adapter ops, since the start."""

    steps: float
    ops: float


@dataclass(frozen=True)
class StatsReply:
    """stage: this worker's of the pipeline. adapters: by id. host_bytes: of the adapters in host
    memory, by id. seconds: None where they are not measured. compilations: of kernels after the
    start, None where none are compiled at run time. engine: the worker's, by its data-parallel
    rank."""

    stage: int
    adapters: dict[int, AdapterReport] = field(default_factory=dict)
    host_bytes: dict[int, int] = field(default_factory=dict)
    seconds: StepSeconds | None = None
    compilations: int | None = None
    engine: int = 0


@dataclass(frozen=True)
class RoutingRequest:
    lora_int_id: int


@dataclass(frozen=True)
class RoutingReply:
    """tokens: that ran through the adapter. sites: of this worker's pipeline stage, by name.
    engine: see StatsReply."""

    tokens: int
    sites: dict[str, SiteRoutingStats]
    engine: int = 0


@dataclass(frozen=True)
class TraceRequest:
    """enabled: whether decisions are recorded from now on."""

    enabled: bool


@dataclass(frozen=True)
class PlainTensor:
    """A float32 tensor as plain values, row by row."""

    shape: tuple[int, ...]
    values: list[float]

    @classmethod
    def of(cls, tensor: Tensor) -> "PlainTensor":
        return cls(tuple(tensor.shape), tensor.float().flatten().tolist())

    def tensor(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32).view(self.shape)


@dataclass(frozen=True)
class SiteTrace:
    """What the router of one site decided in one step, by row: probabilities and weights
    `[rows, E]`, entropy `[rows]`; of a router that reads heads one by one, with an axis `heads`
    after the rows."""

    site: str
    probabilities: PlainTensor
    weights: PlainTensor
    entropy: PlainTensor


@dataclass(frozen=True)
class TraceReply:
    """What was recorded since the last reply."""

    traces: list[SiteTrace]


@dataclass(frozen=True)
class TokenRange:
    """Tokens `start` to `stop` of a request, prompt first. index: among the samples of a prompt."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class RoutesRequest:
    """What routers chose for tokens of the requests that asked for it under `key`. usage: whether
    the sums up to each `stop` are wanted too. forget: nothing of them will be asked again."""

    key: str
    parts: tuple[TokenRange, ...]
    usage: bool = False
    forget: bool = False


@dataclass(frozen=True)
class Routes:
    """experts: int16 `[tokens, routers, most]`; weights: float16, as many or none; both little-
    endian."""

    index: int
    experts: bytes
    weights: bytes


@dataclass(frozen=True)
class RoutingUsage:
    """tokens: that the adapter acted on. decisions: of routers, one token each. activated: experts
    that they chose. flops: of routers and chosen experts; a multiply-add is two."""

    tokens: int = 0
    decisions: int = 0
    activated: int = 0
    flops: int = 0

    def __add__(self, other: "RoutingUsage") -> "RoutingUsage":
        return RoutingUsage(
            self.tokens + other.tokens,
            self.decisions + other.decisions,
            self.activated + other.activated,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class RoutesReply:
    """stage: this worker's of the pipeline. routers: (site, head) of its. most: experts of one
    decision. usage: zeros if it was not asked for."""

    stage: int
    routers: tuple[tuple[str, int], ...]
    most: int
    parts: list[Routes]
    usage: RoutingUsage


@dataclass(frozen=True)
class ForgetRoutesRequest:
    """Nothing will be asked for under `key` any more."""

    key: str


DESCRIBE = Rpc("molehill_describe", Empty, BaseModel)
CORES = Rpc("molehill_cores", Empty, CoresReply)
PREPARE = Rpc("molehill_prepare", AdapterRequest, PrepareReply)
PREPARED = Rpc("molehill_prepared", AdapterRequest, PreparedReply)
DISCARD = Rpc("molehill_discard", AdapterRequest, Empty)
INSTALL = Rpc("molehill_install", InstallRequest, InstallReply)
UNINSTALL = Rpc("molehill_uninstall", UninstallRequest, UninstallReply)
STATS = Rpc("molehill_stats", StatsRequest, StatsReply)
ROUTING = Rpc("molehill_routing", RoutingRequest, RoutingReply)
TRACE = Rpc("molehill_trace", TraceRequest, TraceReply)
ROUTES = Rpc("molehill_routes", RoutesRequest, RoutesReply)
FORGET_ROUTES = Rpc("molehill_forget_routes", ForgetRoutesRequest, Empty)
