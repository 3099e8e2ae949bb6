"""Who may ask for what. Everything that is not known to be harmless is refused.

vLLM's own key guards the paths below /v1 and a few others; what vLLM and its plugins serve beside
them is open. Here every path of the app falls into one of three kinds.
"""

import hashlib
import re
import secrets
from collections.abc import Collection, Sequence
from enum import Enum
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from molehill.api.http import errors


class Kind(Enum):
    """open: for probes, scrapers and the dashboard's page, without a key. ask: answers and lists.
    admin: changes what the server is, adapters first of all."""

    OPEN = "open"
    ASK = "ask"
    ADMIN = "admin"


READ = ("GET", "HEAD", "OPTIONS")

# The dashboard's page carries no data: what it shows it asks for, with a key.
OPEN = ("/health", "/health/ready", "/ping", "/metrics", "/dashboard")

# vLLM's routes outside of /v1 that only compute or show something.
ASK = (
    *("/tokenize", "/detokenize", "/tokenizer_info", "/invocations", "/version", "/load"),
    *("/pooling", "/classify", "/score", "/rerank", "/generative_scoring"),
    *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
)

# Below these, whatever only reads.
ASK_BELOW = ("/v1/", "/v2/", "/inference/", "/cohere/")

# And the writes below them that only compute: an answer, tokens, a prompt.
ASK_WRITES = (
    *("/v1/completions", "/v1/completions/render", "/v1/completions/derender"),
    *("/v1/chat/completions", "/v1/chat/completions/render", "/v1/chat/completions/derender"),
    *("/v1/chat/completions/batch", "/v1/responses", "/v1/responses/render"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"),
    *("/v1/embeddings", "/v2/embed", "/v1/score", "/v1/rerank", "/v2/rerank", "/v1/systemone"),
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"),
    *("/inference/v1/generate", "/cohere/v2/chat", "/cohere/v2/chat/render"),
)

# Ends one answer, which only its own client knows by its id.
CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")

# They change which adapters are served.
OURS = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")

# vLLM's, which trainers ask around a load: they stop the engine for it, and look at its settings.
TRAINERS = ("/pause", "/resume", "/is_paused", "/get_world_size", "/server_info")


def kind_of(method: str, path: str) -> Kind:
    """path: without the app's root path. A websocket counts as a POST.

    With a slash too many, a path is answered with a redirect: that is of its route's kind.
    """
    if method in READ and path in OPEN:
        return Kind.OPEN
    path = path.removesuffix("/")
    if method in READ:
        asks = path in ASK or path.startswith(ASK_BELOW)
    else:
        asks = path in ASK or path in ASK_WRITES or CANCEL.fullmatch(path) is not None
    return Kind.ASK if asks else Kind.ADMIN


def is_below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


class Guard:
    """Checks keys before any route is found (pure ASGI).

    Without API keys whoever reaches the server may ask. Without an admin key the API keys also
    guard the adapters' routes, and vLLM's own ways to change a running server (pause, sleep, new
    base weights, profiling, ...) do not exist. trainers: whether TRAINERS are guarded as the
    adapters' routes are.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        admin_keys: Sequence[str],
        trainers: bool = False,
    ) -> None:
        self._app = app
        self._loading = (*OURS, *TRAINERS) if trainers else OURS
        self._keys = hashes([*keys, *admin_keys]) if keys else None
        self._admin_keys = hashes(admin_keys) if admin_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008)(scope, receive, send)
        else:
            await answer(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPStatus | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        kind = kind_of(scope.get("method", "POST"), path)
        if kind is Kind.OPEN:
            return None
        loads = is_below(path, self._loading)
        if kind is Kind.ADMIN and self._admin_keys is None and not loads:
            return HTTPStatus.NOT_FOUND
        allowed = self._keys
        if kind is Kind.ADMIN and self._admin_keys is not None:
            allowed = self._admin_keys
        if allowed is None or known(token(scope), allowed):
            return None
        asks = kind is Kind.ADMIN and self._keys is not None and known(token(scope), self._keys)
        return HTTPStatus.FORBIDDEN if asks else HTTPStatus.UNAUTHORIZED


def answer(status: HTTPStatus) -> JSONResponse:
    message, kind = {
        HTTPStatus.UNAUTHORIZED: ("a key is missing or wrong", "unauthorized"),
        HTTPStatus.FORBIDDEN: ("this needs the admin key", "admin_key_required"),
        HTTPStatus.NOT_FOUND: ("Not Found", "not_found"),
    }[status]
    headers = {"WWW-Authenticate": "Bearer"} if status is HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(errors.body(message, kind, status), status.value, headers)


def hashes(keys: Collection[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys if key]


def token(scope: Scope) -> bytes:
    """Hash of the request's bearer token, of the empty one if there is none."""
    scheme, _, value = Headers(scope=scope).get("Authorization", "").partition(" ")
    return hashlib.sha256(value.encode() if scheme.lower() == "bearer" else b"").digest()


def known(given: bytes, allowed: Collection[bytes]) -> bool:
    """Hashes: how long it takes tells nothing of the keys."""
    return any(secrets.compare_digest(given, key) for key in allowed)
