"""Puts what routers chose into the answers of vLLM's routes: JSON, and streams of events."""

import base64
import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from molehill.api.vllm.generation_header import begins_events
from molehill.api.vllm.request_scope import RequestScope
from molehill.api.vllm.routed_calls import RoutedTokens

# What ends an event of a stream, and what begins its data.
END, DATA = b"\n\n", b"data: "


class RoutedAnswers:
    """An ASGI `send`, for a request that asks. A stream's event has what came since the last one;
    answers that are refusals go on as they are."""

    def __init__(self, request: RequestScope, send: Send) -> None:
        self._request = request
        self._send = send
        self._start: Message | None = None
        self._streams = False
        self._text = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or (self._start is None and not self._streams):
            await self._send(message)
        elif self._streams:
            await self._send_events(message)
        else:
            await self._send_whole(message)

    async def _begin(self, start: Message) -> None:
        if start["status"] == 200 and begins_events(start):
            self._streams = True
        elif start["status"] == 200 and is_json(start):
            # Its length changes.
            self._start = start
            return
        await self._send(start)

    async def _send_whole(self, message: Message) -> None:
        self._text += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None, "a body comes after its start"
        body = self._extended(self._text)
        MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({**message, "body": body})

    async def _send_events(self, message: Message) -> None:
        *events, self._text = (self._text + message.get("body", b"")).split(END)
        more = message.get("more_body", False)
        body = b"".join(self._event(event) + END for event in events)
        if not more:
            body, self._text = body + self._text, b""
        if body or not more:
            await self._send({**message, "body": body})

    def _event(self, event: bytes) -> bytes:
        text = event.removeprefix(DATA)
        return DATA + self._extended(text) if text.startswith(b"{") else event

    def _extended(self, text: bytes) -> bytes:
        document = json.loads(text)
        if not isinstance(document, dict):
            return text
        for choice in document.get("choices") or ():
            routed = self._request.routed_tokens(choice.get("index", 0))
            if routed is not None:
                choice["molehill"] = {"routing": encoded(routed)}
        usage = self._request.routing_usage()
        if usage is not None and document.get("usage"):
            per_decision = usage.activated / usage.decisions if usage.decisions else None
            document["usage"]["molehill"] = {
                "tokens": usage.tokens,
                "router_decisions": usage.decisions,
                "experts_activated": usage.activated,
                "experts_per_decision": per_decision,
                "low_rank_flops": usage.flops,
            }
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def is_json(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("application/json")


def encoded(routed: RoutedTokens) -> dict[str, Any]:
    """As clients get it: little-endian arrays of `shape` in base64."""
    answer: dict[str, Any] = {
        "start": routed.start,
        "shape": list(routed.experts.shape),
        "experts": base64.b64encode(routed.experts.tobytes()).decode(),
    }
    if routed.weights is not None:
        answer["weights"] = base64.b64encode(routed.weights.tobytes()).decode()
    return answer
