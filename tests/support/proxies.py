"""Proxies in front of servers, as their packages install them: LiteLLM's and vLLM's router."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from support.api_client import BASE, KEY, TESTS
from support.server import free_port, stop

# Folders of programs that are looked into before PATH. Their packages need other versions than
# vLLM does, so they have environments of their own.
FOLDERS = "MOLEHILL_FLEET_BIN"
START_SECONDS = 120
CONFIG = TESTS.parent / "deploy" / "litellm" / "config.yaml"
MASTER_KEY = "sk-a-test-key"


@dataclass(frozen=True)
class Proxy:
    """How one is started. key: what clients give it. ready: answers 200 once it serves.

    command: its arguments, of its port and the servers' URLs. environment: of those URLs.
    """

    program: str
    key: str
    ready: str
    command: Callable[[int, Sequence[str]], list[str]]
    environment: Callable[[Sequence[str]], Mapping[str, str]] = field(default=lambda _: {})


def litellm_command(port: int, urls: Sequence[str]) -> list[str]:
    return ["--config", str(CONFIG), "--host", "127.0.0.1", "--port", str(port)]


def litellm_environment(urls: Sequence[str]) -> dict[str, str]:
    return {
        **{f"MOLEHILL_URL_{number}": f"{url}/v1" for number, url in enumerate(urls, 1)},
        "MOLEHILL_API_KEY": KEY,
        "MOLEHILL_PROBED": f"hosted_vllm/{BASE}",
        "LITELLM_MASTER_KEY": MASTER_KEY,
        # It would fetch its list of prices at every start.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def router_command(port: int, urls: Sequence[str]) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls),
        *("--policy", "round_robin", "--health-check-interval-secs", "2"),
        *("--worker-startup-check-interval", "1", "--cb-timeout-duration-secs", "10"),
        *("--prometheus-port", str(free_port())),
    ]


PROXIES = {
    "litellm": Proxy(
        "litellm", MASTER_KEY, "/health/liveliness", litellm_command, litellm_environment
    ),
    "vllm-router": Proxy("vllm-router", KEY, "/health", router_command),
}


def found(name: str) -> str | None:
    """The program's path, if it is installed."""
    folders = os.environ.get(FOLDERS, "").split(os.pathsep)
    folders += [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(folder for folder in folders if folder))


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where the program is not installed."""
    reason = f"{name} is not installed, neither in a folder of {FOLDERS} nor on the PATH"
    return pytest.mark.skipif(found(name) is None, reason=reason)


@contextmanager
def running(proxy: Proxy, urls: Sequence[str], log: Path) -> Iterator[str]:
    """Its URL, once it serves. Raises RuntimeError with the end of its log if it does not."""
    port = free_port()
    path = found(proxy.program)
    assert path is not None
    command = [path, *proxy.command(port, urls)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **proxy.environment(urls)},
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait(process, f"{url}{proxy.ready}", log)
        yield url
    finally:
        stop(process)


def wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"not ready; status {process.poll()}:\n{tail}")
