"""One version of one adapter, and what a read of its files leaves behind."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from molehill.api.adapters.chat import AdapterChat, served_texts, without_rows
from molehill.api.adapters.errors import RequestError, encodable
from molehill.api.adapters.status import AdapterState, GenerationStatus
from molehill.engine.adapter.added_tokens import AddedTokens, added_tokens
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.tokenizer_files import TokenText
from molehill.engine.transform.routers import DecidingRouter, routers
from molehill.engine.transform.static_gates import gate

# A few hardly lengthen the step of those who are being served.
MOST_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Content:
    """What an adapter's files held; the tensors themselves lie at `path`, in the store.

    digest: sha256 of the bytes that were read, the generation's identity before clients.
    num_bytes: of the tensors in canonical float32. plan: sites by what they need when they run.
    invocation_tokens: see Adapter. chat: None where its tokenizer is the base's, or not asked for.
    routers: those that decide by the token. probe_tokens: ids of which an answer hangs on at least
    one if the adapter does something; none where it acts on every token. rows: of its own, on
    the embedding and on the head, by site. added: see AddedTokens. token_texts: that its tokenizer
    has beside the base's.
    """

    digest: str
    kind: str
    num_bytes: int
    warnings: tuple[str, ...]
    plan: Mapping[str, int]
    path: Path
    invocation_tokens: tuple[int, ...] = ()
    chat: AdapterChat | None = None
    routers: tuple[DecidingRouter, ...] = ()
    probe_tokens: tuple[int, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    added: AddedTokens = field(default_factory=AddedTokens)
    token_texts: tuple[TokenText, ...] = ()

    @property
    def most_experts(self) -> int:
        """Of one decision of any router."""
        return max((router.most for router in self.routers), default=0)


def content_of(
    adapter: Adapter,
    path: Path,
    chat: AdapterChat | None = None,
    num_tokens: int | None = None,
) -> Content:
    """Counts static sites; merging them is up to the workers. None is where the token's id chooses
    the adapter. num_tokens: of the base's own vocabulary."""
    added = added_tokens(adapter, num_tokens)
    texts = served_texts(chat, added, num_tokens)
    warnings = () if chat is None else (*chat.warnings, *without_rows(chat, texts))
    static = sum(gate(mixture).weights is not None for mixture in adapter.sites.values())
    sites = adapter.num_sites
    summary = {"sites": sites, "static": static, "dynamic": sites - static}
    return Content(
        adapter.digest,
        adapter.kind,
        adapter.num_bytes,
        (*adapter.warnings, *warnings),
        summary,
        path,
        adapter.invocation_tokens,
        chat,
        routers(adapter),
        probe_tokens(adapter),
        {site: len(table.ids) for site, table in adapter.rows.items()},
        added,
        texts,
    )


def probe_tokens(adapter: Adapter) -> tuple[int, ...]:
    """Of what acts on single ids: rows of the vocabulary, and adapters that tokens have by their
    ids."""
    ids = [
        token for rows in adapter.rows.values() for token in rows.ids[:MOST_PROBE_TOKENS].tolist()
    ]
    if adapter.by_token is not None:
        table = adapter.by_token.adapter_of
        places = table.unique().tolist()
        ids += [int((table == place).nonzero()[0]) for place in places if place >= 0]
    return tuple(dict.fromkeys(ids))[:MOST_PROBE_TOKENS]


@dataclass(frozen=True, eq=False)
class Generation:
    """One version of the weights behind a name. It never changes; what becomes of it is `status`.

    request: what the engine takes for it, with an id that is never used again. created: Unix
    seconds.
    """

    name: str
    content: Content
    request: Any
    status: GenerationStatus
    created: int = field(default_factory=lambda: int(time.time()))

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

    state: ClassVar = AdapterState.LOADING
    name: str
    source: str
    stage: Stage = "waiting"
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Failure:
    """A name that should serve and does not, and why: the error's type and message, for clients.
    desired: see Source.

    Not the error itself: its traceback would keep what was read in memory.
    """

    state: ClassVar = AdapterState.FAILED
    name: str
    source: str
    kind: str
    message: str
    desired: bool = False


def failure_of(name: str, source: str, error: Exception, desired: bool = False) -> Failure:
    if isinstance(error, RequestError | AdapterError):
        return Failure(name, source, error.kind, encodable(str(error)), desired)
    # Its message is for the operator alone: it may hold paths of the server.
    message = f"{type(error).__name__}; see the server's log"
    return Failure(name, source, "internal_error", message, desired)


@dataclass(frozen=True)
class Loaded:
    """What a load came to."""

    generation: Generation
    status: Literal["loaded", "replaced", "unchanged", "limits_changed"]
