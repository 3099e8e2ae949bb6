"""The dashboard in a real browser, on a server of canned answers or on a real one."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request

from molehill.api.http import dashboard
from support.browsers import headless
from support.server import free_port

PATIENCE_SECONDS = 30
LAYERS, EXPERTS = 24, 8
PROJECTIONS = ("q_proj", "v_proj", "down_proj")


@contextmanager
def browser(width: int = 1280, height: int = 1000, dark: bool = False) -> Iterator[Any]:
    """Headless Chromium; skips the test where there is none."""
    with headless(["--force-dark-mode" if dark else "--force-color-profile=srgb"]) as chrome:
        # A window may not be as narrow as a phone; what the page is shown in may.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield chrome


def until(condition: Any, what: str) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {PATIENCE_SECONDS} s")


def complaints(chrome: Any) -> list[str]:
    """What the page's console says, of its security policy too."""
    return [entry["message"] for entry in chrome.get_log("browser")]


@dataclass
class Canned:
    """Answers of a server that routes tokens at a steady pace.

    names: of its adapters. failures: why others do not serve. key: that it wants. down: answers 500
    instead.
    """

    names: list[str]
    failures: dict[str, str] = field(default_factory=dict)
    key: str = ""
    down: bool = False
    url: str = ""
    started: float = field(default_factory=time.monotonic)

    def overview(self) -> dict[str, Any]:
        passed = time.monotonic() - self.started
        return {
            "seconds": {"steps": passed * 0.8, "adapter_ops": passed * 0.2},
            "adapters": [self.summary(i, name, passed) for i, name in enumerate(self.names)]
            + [failed(name, why) for name, why in self.failures.items()],
        }

    def summary(self, i: int, name: str, passed: float) -> dict[str, Any]:
        tokens = int(1000 + passed * (50 + 10 * i))
        # Whose slope goes up and down: 2.5 experts, give or take one.
        average = 2.5 + (math.cos(i) - math.cos(i + passed / 5)) * 5 / (passed + 20)
        total = routing(tokens * LAYERS * len(PROJECTIONS), average)
        return {
            "adapter": name,
            "kind": ("dynmole", "mixlora", "mola")[i % 3],
            "state": "serving",
            "note": None,
            "requests_in_flight": i % 4,
            "resident_bytes": 10_000_000 + i * 1000,
            "tokens": tokens,
            "total": total,
        }

    def routing(self, name: str) -> dict[str, Any]:
        tokens = int(1000 + (time.monotonic() - self.started) * 50)
        sites = [
            site(layer, projection, tokens) for layer in range(LAYERS) for projection in PROJECTIONS
        ]
        total = routing(sum(one["decisions"] for one in sites), 2.5)
        result = {"adapter": name, "generation": "0123456789abcdef" * 4, "kind": "dynmole"}
        return {**result, "tokens": tokens, "total": total, "sites": sites}

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(dashboard.router)

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Any:
            if request.url.path.startswith("/v1/"):
                if self.down:
                    return JSONResponse({}, 500)
                if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                    return JSONResponse({}, 401)
            return await call_next(request)

        @app.get("/v1/routing")
        def overview() -> dict[str, Any]:
            return self.overview()

        @app.get("/v1/adapters/{name:path}/routing")
        def adapter(name: str) -> Any:
            return self.routing(name) if name in self.names else JSONResponse({}, 404)

        return app


def failed(name: str, why: str) -> dict[str, Any]:
    counts = ("decisions", "experts_activated", "flops_done", "flops_avoided")
    ratios = ("experts_per_decision", "soft_share", "mean_entropy", "imbalance")
    return {
        "adapter": name,
        "kind": None,
        "state": "failed",
        "note": why,
        "requests_in_flight": 0,
        "resident_bytes": 0,
        "tokens": 0,
        "total": {**dict.fromkeys(counts, 0), **dict.fromkeys(ratios)},
    }


def routing(decisions: int, experts: float) -> dict[str, Any]:
    activated = int(decisions * experts)
    return {
        "decisions": decisions,
        "experts_activated": activated,
        "experts_per_decision": activated / decisions,
        "soft_share": 0.0625,
        "mean_entropy": 0.71,
        "imbalance": 1.6,
        "flops_done": activated * 100_000,
        "flops_avoided": (EXPERTS * decisions - activated) * 100_000,
    }


def site(layer: int, projection: str, decisions: int) -> dict[str, Any]:
    offset = PROJECTIONS.index(projection)
    shares = [(0.5 + 0.5 * math.sin(layer / 3 + expert + offset)) ** 2 for expert in range(EXPERTS)]
    tokens = [int(decisions * share) for share in shares]
    block = "mlp" if projection == "down_proj" else "self_attn"
    return {
        **routing(decisions, sum(tokens) / decisions),
        "imbalance": max(tokens) * EXPERTS / sum(tokens),
        "site": f"layers.{layer}.{block}.{projection}",
        "layer": layer,
        "projection": projection,
        "experts": EXPERTS,
        "expert_tokens": tokens,
        "expert_shares": [count / decisions for count in tokens],
    }


@contextmanager
def serving(canned: Canned) -> Iterator[Canned]:
    """Its answers over HTTP, from a thread."""
    port = free_port()
    config = uvicorn.Config(canned.app(), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started, "the canned server")
    canned.url = f"http://127.0.0.1:{port}"
    try:
        yield canned
    finally:
        server.should_exit = True
        thread.join()
