"""A replica's server, and that it does not outlive its replica."""

import subprocess
import sys

import psutil
import pytest
from support.api_client import eventually

from molehill.api.ray import child
from molehill.api.ray.server_process import ServerProcess, environment_of
from molehill.api.ray.settings import RaySettings

ORPHANED = """
import os, subprocess, sys, time
lines = [
    "import os, threading, time",
    "from molehill.api.ray.child import end_with",
    "threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()",
    "print('up', flush=True)",
    "time.sleep(60)",
]
child = subprocess.Popen([sys.executable, "-c", chr(10).join(lines)], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_server_ends_with_its_replica() -> None:
    parent = subprocess.run(
        [sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True, check=False
    )
    assert parent.returncode == -9
    pid = int(parent.stdout)
    assert eventually(lambda: not psutil.pid_exists(pid) or zombie(pid))
    assert child.LOOK_SECONDS <= 1


def zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ends_at_its_start_is_no_replica() -> None:
    settings = RaySettings(model="/no/such/model", server_arguments=["--adapter-memory=lots"])
    with pytest.raises(RuntimeError, match="ended with status 2"):
        ServerProcess(settings)


def test_only_the_replica_may_change_a_server_with_a_key() -> None:
    assert environment_of({"PATH": "x"}) == {"PATH": "x"}
    result = environment_of({"VLLM_API_KEY": "asks"})
    assert len(result["MOLEHILL_ADMIN_API_KEY"]) == 64
    given = {"VLLM_API_KEY": "asks", "MOLEHILL_ADMIN_API_KEY": "changes"}
    assert environment_of(given) == given
