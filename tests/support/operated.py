"""Clients of a server that an operator runs, and a server of files for it to fetch."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from support.api_client import BASE, Api, copy_adapter, oracle
from support.http_servers import running

ADMIN = "an-admin-key"
SETTLED_SECONDS = 30

# What lies below `allowed/held` is sent while this is set.
SENDING = threading.Event()
SENDING.set()


class Operated(Api):
    """A client with the admin key, and one that may only ask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asking = self.http
        headers = {"Authorization": f"Bearer {ADMIN}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def post(self, name: str, source: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/adapters", json={"name": name, "source": source, **more})

    def mixed(self, weights: dict[str, float]) -> httpx.Response:
        """What a mix answers to who may only ask, and comes back as long as it is told to."""
        body = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
        while True:
            mix = {"molehill": {"mix": weights}}
            answer = self.asking.post("/v1/completions", json={**body, **mix})
            if answer.status_code != 429:
                return answer
            assert answer.headers["retry-after"] == "1"
            assert self.error(answer)[1] == "too_many_mixes"
            time.sleep(0.05)

    def info(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.http.get(f"/v1/adapters/{name}").json()
        return result

    def listed(self) -> dict[str, dict[str, Any]]:
        return {info["name"]: info for info in self.http.get("/v1/adapters").json()["data"]}

    def right(self, name: str, case: str) -> bool:
        """Whether the name answers as the case's oracle does."""
        prompt = oracle(case)["prompts"][0]
        return self.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """An HTTP server of a folder, on this machine. `/moved/` redirects to the folder itself."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/allowed/held/"):
                SENDING.wait(SETTLED_SECONDS)
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/moved"))
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            return

    handler = partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with running(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


def until(condition: Any, seconds: float = SETTLED_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def remembered(folder: Path) -> set[str]:
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    return {entry["name"] for entry in manifest["adapters"]}


def copy_and_load(api: Operated, name: str, case: str) -> str:
    copy_adapter(case, api.root / "group" / f"of-{name}")
    generation: str = api.post(name, f"group/of-{name}").json()["generation"]
    return generation
