"""What the process that owns the registry and one that follows it say to each other, over a Unix
socket: msgpack, each message after its length in four bytes.

A follower numbers what it asks; an answer has the number of its question. A lease or a slot has its
question's number from then on.
"""

from asyncio import StreamReader, StreamWriter
from typing import TypeVar

import msgspec

from molehill.api.adapters.chat import AdapterChat
from molehill.api.adapters.events import NotInvoked, Tier
from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.formats.io.tokenizer_files import TokenText

LENGTH_BYTES = 4

Message = TypeVar("Message")


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Of one request, to what the name serves: Granted, Limited or Unknown."""

    number: int
    name: str


class Describe(msgspec.Struct, frozen=True, tag=True):
    """The generation of that lease: Described."""

    number: int
    lease: int


class AcquireSlot(msgspec.Struct, frozen=True, tag=True):
    """One more hold of that lease's request, in a slot: Entered or SlotRefused."""

    number: int
    lease: int


class ReleaseSlot(msgspec.Struct, frozen=True, tag=True):
    """That hold is over, or not waited for any more. Once for each AcquireSlot."""

    slot: int


class Charge(msgspec.Struct, frozen=True, tag=True):
    """Tokens, of the lease's name."""

    lease: int
    tokens: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """The request has ended, or is not waited for any more. Once for each Admit."""

    lease: int


class Hit(msgspec.Struct, frozen=True, tag=True):
    """See LifecycleMetrics.hit."""

    name: str
    tier: Tier
    seconds: float


class MissedInvocation(msgspec.Struct, frozen=True, tag=True):
    """See LifecycleMetrics.not_invoked."""

    name: str
    outcome: NotInvoked


Question = Admit | Describe | AcquireSlot
FromFollower = Question | ReleaseSlot | Charge | Release | Hit | MissedInvocation


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The first message on a connection. num_tokens, extra_tokens: see BaseModel."""

    num_tokens: int | None
    extra_tokens: int


class Granted(msgspec.Struct, frozen=True, tag=True):
    """A lease. lora_int_id, path, digest, created: of its generation. unprobed: see Lease."""

    number: int
    lora_int_id: int
    path: str
    digest: str
    created: int
    when_not_invoked: WhenNotInvoked | None
    unprobed: bool


class Limited(msgspec.Struct, frozen=True, tag=True):
    """See LimitReachedError."""

    number: int
    message: str
    retry_after: int


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """The name serves nothing."""

    number: int


class Described(msgspec.Struct, frozen=True, tag=True):
    """Of a generation's content what requests need that ask nothing of its routing."""

    number: int
    kind: str
    num_bytes: int
    invocation_tokens: tuple[int, ...]
    chat: AdapterChat | None
    added: AddedTokens
    token_texts: tuple[TokenText, ...]


class Entered(msgspec.Struct, frozen=True, tag=True):
    """In a slot. tier: where the generation was before."""

    number: int
    tier: Tier


class SlotRefused(msgspec.Struct, frozen=True, tag=True):
    """See EngineRefusedError."""

    number: int
    message: str


Answer = Granted | Limited | Unknown | Described | Entered | SlotRefused
FromOwner = Welcome | Answer

_encoder = msgspec.msgpack.Encoder()
from_follower = msgspec.msgpack.Decoder(FromFollower)
from_owner = msgspec.msgpack.Decoder(FromOwner)


def write(writer: StreamWriter, message: FromFollower | FromOwner) -> None:
    data = _encoder.encode(message)
    writer.write(len(data).to_bytes(LENGTH_BYTES) + data)


async def read(reader: StreamReader, decoder: "msgspec.msgpack.Decoder[Message]") -> Message:
    """Raises IncompleteReadError at the end, ConnectionError, and msgspec's DecodeError."""
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
    return decoder.decode(await reader.readexactly(length))
