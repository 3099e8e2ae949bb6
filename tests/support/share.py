"""What a test process takes of the machine: one thread, and its part of the cores for servers.

Has to be imported before torch, whose OpenMP reads the environment once.
"""

import os

# Of pytest-xdist; neither is set where one process runs all tests.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# For the tests' own computing. Matrices are tiny, and threads that wait for each other spin: on two
# busy cores that took eight times as long. Servers do not get it: they run as they do for users.
OPENMP = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def cores() -> list[int]:
    """Of this machine, those that are this process's share."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    everyone = sorted(os.sched_getaffinity(0))
    return everyone[int(WORKER.removeprefix("gw")) :: WORKERS] or everyone[:1]


def take() -> None:
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)
    allowed = cores()
    if WORKERS > 1 and allowed:
        # Two servers, left to vLLM, would compute on the same core. It leaves one to the server's
        # other processes where it can.
        computing = allowed[: max(1, len(allowed) - 1)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, computing)))


def environment() -> dict[str, str]:
    """Of this process, for a server."""
    return {name: value for name, value in os.environ.items() if name not in OPENMP}


take()
