"""Starts and stops a real server for end-to-end tests and benchmarks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from support import share
from support import warm as warming

START_SECONDS = 400
KV_CACHE_BYTES = 64 << 20
STOP_SECONDS = 60

# Small and exact: the tiny models fit, and greedy tokens can be compared with fp32 oracles.
# A small KV cache, for vLLM writes zeros into all of it.
TINY = (
    *("--dtype", "float32", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Server:
    """A running `molehill serve`. url: without a trailing slash. log: its output so far.

    stages: what it said that it does while it started, each once. refusals: connections that it
    refused after its first answer.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes] | warming.Forked
    stages: list[str] = field(default_factory=list)
    refusals: int = 0

    def get(self, path: str, timeout: float = 30) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout) as response:
            text: str = response.read().decode()
            return text

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


SERVE = "import sys; from molehill.api.cli.main import main; sys.exit(main())"


def command(model: Path, *arguments: str) -> list[str]:
    """`molehill serve`, from the package that the tests import."""
    return [sys.executable, "-c", SERVE, "serve", str(model), *arguments]


@contextmanager
def serve(
    model: Path,
    log: Path,
    arguments: Sequence[str] = TINY,
    environment: Mapping[str, str] | None = None,
    warm: bool = False,
) -> Iterator[Server]:
    """A server that answers `/health`, stopped by SIGTERM at the end.

    warm: it is forked from a process that has imported vLLM (support/warm.py), and so are its
    engine and worker, which are not its children; otherwise all starts as it does for users.
    Raises RuntimeError with the end of its log if it does not come up.
    """
    port = free_port()
    arguments = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
    settings = {**share.environment(), **ENVIRONMENT, **(environment or {})}
    log.write_bytes(b"")
    process: subprocess.Popen[bytes] | warming.Forked
    if warm:
        process = warming.molehill(["serve", str(model), *arguments], log, settings)
    else:
        # Several processes write to it.
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(model, *arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=settings,
                process_group=0,
            )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        stop(process)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            code = server.process.returncode
            raise RuntimeError(f"the server ended with {code}:\n{server.tail()}")
        try:
            server.get("/health", timeout=5)
        except urllib.error.HTTPError as answer:
            stage = json.loads(answer.read() or "{}").get("stage")
            if stage not in [None, *server.stages[-1:]]:
                server.stages.append(stage)
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            refused = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
            server.refusals += refused and bool(server.stages)
        else:
            return
        time.sleep(0.25)
    raise RuntimeError(f"no answer in {START_SECONDS} s:\n{server.tail()}")


def stop(process: subprocess.Popen[bytes] | warming.Forked) -> None:
    """SIGTERM, then SIGKILL for whatever is left of the server's process group."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
