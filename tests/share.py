"""What one of several test processes takes of the machine: its part of the cores.

Has to be imported before torch, whose OpenMP reads the environment once.
"""

import os

# Of pytest-xdist; neither is set where one process runs all tests.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# What is set here for the tests' own computing, and is not handed to servers: those are to run as
# they do for users. Threads that wait for the core of another process must not spin.
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def cores() -> list[int]:
    """Of this machine, those that are this process's share."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    everyone = sorted(os.sched_getaffinity(0))
    return everyone[int(WORKER.removeprefix("gw")) :: WORKERS] or everyone[:1]


def take() -> None:
    """Two servers that vLLM starts by itself would compute on the same core."""
    own = cores()
    if WORKERS == 1 or not own:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(len(own)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # One is left to the server's other processes, as vLLM does.
    computing = own[: max(1, len(own) - 1)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, computing)))


def environment() -> dict[str, str]:
    """Of this process, for a server."""
    return {name: value for name, value in os.environ.items() if name not in OPENMP}


take()
