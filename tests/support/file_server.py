"""A server of adapters' files on this machine: plain HTTP, and the hub's API."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molehill.api.sources.fetch import Sources
from molehill.api.sources.roots import AdapterRoots
from support.http_servers import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"

X_LORA = "x-lora"
LISTED = ("adapter", "sizeless", X_LORA)

# Set by nobody.
SILENCE = threading.Event()


class Files(http.server.BaseHTTPRequestHandler):
    """A repository as the hub's API shows it, and its files below `/files/`; and one of an X-LoRA
    in a directory beside."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/nobody"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/silent" in path:
            SILENCE.wait()
        elif "/nothing" in path:
            self.send_error(404)
        elif "/broken" in path:
            self.send_error(500)
        elif "/moved" in path:
            self.send_response(302)
            self.send_header("Location", path.replace("/moved", "/adapter"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith(tuple(f"/api/models/org/{name}" for name in LISTED)):
            sized = "sizeless" not in path
            listed_files = [
                {
                    "rfilename": str(file.relative_to(self.folder_of(path))),
                    **({"size": file.stat().st_size} if sized else {}),
                }
                for file in self.folder_of(path).rglob("*")
                if file.is_file()
            ]
            listed = {"id": "org/adapter", "sha": COMMIT, "siblings": listed_files}
            self.send(json.dumps(listed).encode(), body)
        elif path.startswith(
            ("/files/", *(f"/org/{name}/resolve/{COMMIT}/" for name in ("adapter", X_LORA)))
        ):
            file = self.file_of(path)
            if file is not None:
                self.send(file.read_bytes(), body)
            else:
                self.send_error(404)
        else:
            self.send_error(404)

    def folder_of(self, path: str) -> Path:
        return self.folder.parent / X_LORA if f"/org/{X_LORA}" in path else self.folder

    def file_of(self, path: str) -> Path | None:
        """What comes after `/files/NAME/` or the commit."""
        below = path.split("/", 3 if path.startswith("/files/") else 5)[-1]
        file = self.folder_of(path) / below
        return file if file.is_file() else None

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(content):x}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(URL, paths that were asked for) while it serves a folder's files."""
    asked: list[str] = []
    handler = type("Handler", (Files,), {"folder": folder, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with running(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", asked


def sources(url: str, **more: Any) -> Sources:
    return Sources(AdapterRoots([]), prefixes=[f"{url}/files"], **more)


FETCH = """
import resource, sys
from molehill.api.sources import fetch as sources
from molehill.api.sources.roots import AdapterRoots
from molehill.engine import formats
sources.SILENCE_SECONDS = 1.0
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for text, limit, room in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), most))
    prefix = text.rpartition("/")[0]
    allowed = sources.Sources(AdapterRoots([]), hub=True, prefixes=[prefix], limit=int(limit))
    try:
        with allowed.fetch_for_vllm(text) as source:
            print(source.label, formats.read(source.directory).digest)
    except Exception as error:
        print(type(error).__name__, error)
"""


def fetch_from_hub(url: str, home: Path, wanted: list[tuple[str, str, str]]) -> list[str]:
    """A line for each of (source, bytes that an adapter may have, bytes that a file may have)."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *(word for words in wanted for word in words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()
