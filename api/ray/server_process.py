"""The server of one replica: a process of its own on a free port of the loopback interface."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from molehill.api.ray.settings import RaySettings

LOOK_SECONDS = 0.25
# For the end of the processes, after their requests'.
END_SECONDS = 20


class ServerProcess:
    """url: without a trailing slash. admin: headers of what changes the server.

    Where the environment has a key for asking and none for changing, the server gets one of its
    own, for nobody but its replica is to change it.
    """

    def __init__(self, settings: RaySettings) -> None:
        """Returns when the server is ready. Raises RuntimeError where it ends before, or is not in
        time."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._drain_seconds = settings.drain_seconds
        self._stopping = False
        environment = environment_of(os.environ)
        key = environment.get("MOLEHILL_ADMIN_API_KEY")
        self.admin = {"Authorization": f"Bearer {key}"} if key else {}
        command = [sys.executable, "-m", "molehill.api.ray.child", str(os.getpid())]
        self._process = subprocess.Popen([*command, *settings.arguments(port)], env=environment)
        try:
            self._wait(settings.start_seconds)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            if is_ready(self.url):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {seconds} s; see its log above")
            time.sleep(LOOK_SECONDS)
        raise RuntimeError(
            f"the server ended with status {self._process.returncode}; see its log above"
        )

    def watch(self, ended: Callable[[int], None]) -> None:
        """Calls `ended` with its status, in a thread, if it ends without having been stopped."""

        def wait() -> None:
            status = self._process.wait()
            if not self._stopping:
                ended(status)

        threading.Thread(target=wait, daemon=True, name="molehill-server").start()

    def stop(self) -> None:
        """Lets requests finish, for `drain_seconds`."""
        self._stopping = True
        self._process.terminate()
        try:
            self._process.wait(self._drain_seconds + END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    result = dict(environment)
    if result.get("VLLM_API_KEY"):
        result.setdefault("MOLEHILL_ADMIN_API_KEY", secrets.token_hex(32))
    return result


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
