"""Faults of disks, memory and clients, against a real server that goes on as before.

What cannot be survived, the death of a worker, comes last: it must be told at once.
"""

import json
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from api_client import (
    BASE,
    GOLDEN,
    KEY,
    Api,
    copy_adapter,
    eventually,
    oracle,
    resident_memory,
)
from server import TINY, Server, serve

from molehill.engine.adapter import Adapter
from molehill.engine.formats import native
from molehill.engine.huggingface import base_model
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Soft

CASES = ("lora", "mola", "mixlora", "dynmole-soft", "loramoe", "dynmole-default")
PROMPTS = {case: oracle(case)["prompts"][0] for case in CASES}

MEGABYTE = 1 << 20
# Of one adapter, and of all of them in the worker.
LARGEST, MEMORY = 256 * MEGABYTE, 64 * MEGABYTE
SEATS = 8
ATTEMPTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("faults")
    for case in CASES:
        copy_adapter(case, found / "root" / case)
    return found


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    """Few seats in a batch, so that a handful of clients saturates it."""
    arguments = [
        *(*TINY, "--max-model-len", "2048", "--served-model-name", BASE, "--api-key", KEY),
        *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
        *("--max-num-seqs", str(SEATS), "--adapter-memory", str(MEMORY)),
        *("--max-adapter-bytes", str(LARGEST)),
    ]
    with serve(model, folder / "log", arguments) as found:
        yield found


@pytest.fixture(scope="module")
def shared(server: Server, folder: Path) -> Api:
    return Api(server.url, folder / "root", folder / "store")


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    """Whatever the test did: the base and an adapter answer as they should, nothing is left."""
    yield shared
    for name in set(shared.models()) - {BASE}:
        assert shared.unload(name).status_code == 200
    assert eventually(lambda: [path.name for path in shared.store.iterdir()] == ["manifest.json"])
    assert right(shared, BASE, "base")
    assert shared.load("after", "mola").json()["status"] == "loaded"
    assert right(shared, "after", "mola")
    assert shared.unload("after").status_code == 200


def right(api: Api, name: str, case: str) -> bool:
    prompt = oracle(case)["prompts"][0]
    return api.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def worker_of(server: Server) -> psutil.Process:
    """The one process of the server that holds the model: nobody else's parent."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    named = [child for child in family if "Worker" in " ".join([child.name(), *child.cmdline()])]
    assert len(named) == 1, [(child.pid, child.name(), child.cmdline()) for child in family]
    return named[0]


# Disk and memory


@contextmanager
def limited(process: int, what: int, limit: int) -> Iterator[None]:
    """Lowers a limit of a running process, as an operator's `ulimit` would, and lifts it again."""
    soft, hard = resource.prlimit(process, what)
    resource.prlimit(process, what, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(process, what, (soft, hard))


def save_big(path: Path, rows: int) -> int:
    """A valid adapter of all of tiny-llama's linears; returns its bytes."""
    base = base_model(GOLDEN / "tiny-llama")
    experts = max(1, rows // 64)
    sites = {
        site: LinearMixture(
            Experts(torch.randn(rows, i) * 0.01, torch.randn(o, rows) * 0.01, (64,) * experts),
            Soft(),
            torch.randn(experts, i),
        )
        for site, (i, o) in base.linears.items()
        if site.startswith("layers.")
    }
    adapter = Adapter("soft", sites)
    native.write(adapter, path)
    return adapter.num_bytes


@pytest.fixture(scope="module")
def big(folder: Path) -> int:
    """Bytes of the adapter `big`, which fits."""
    return save_big(folder / "root" / "big", 2048)


@pytest.mark.parametrize("kilobytes", [16, 48], ids=["a private copy", "the store's copy"])
def test_a_full_disk_refuses_the_load_and_nothing_else(
    api: Api, server: Server, kilobytes: int
) -> None:
    """The adapter's file has 32 KB, its copy in the store 64; no file may grow beyond the limit."""
    source = f"full-{kilobytes}"
    copy_adapter("dora", api.root / source)
    before = sorted(path.name for path in api.store.iterdir())
    with limited(server.process.pid, resource.RLIMIT_FSIZE, kilobytes << 10):
        status, kind, message = api.error(api.load("m", source))
        assert (status, kind) == (507, "store_failed")
        assert str(api.store) not in message
        assert right(api, BASE, "base")
    assert sorted(path.name for path in api.store.iterdir()) == before
    assert api.load("m", source).status_code == 200
    assert right(api, "m", "dora")


@pytest.mark.parametrize("where", ["api", "worker"])
def test_a_process_without_memory_refuses_the_load_and_goes_on(
    api: Api, server: Server, big: int, where: str
) -> None:
    process = psutil.Process(server.process.pid) if where == "api" else worker_of(server)
    assert right(api, BASE, "base")
    room = process.memory_info().vms + big // 2
    with limited(process.pid, resource.RLIMIT_AS, room):
        status, kind, message = api.error(api.load("m", "big"))
    expected = (507, "out_of_memory") if where == "api" else (503, "engine_refused")
    assert (status, kind) == expected, message
    assert "memory" in message
    assert right(api, BASE, "base")
    assert api.load("m", "big").status_code == 200


def test_an_adapter_that_is_larger_than_the_memory_for_adapters_is_refused(api: Api) -> None:
    assert api.load("small", "mola").status_code == 200
    assert save_big(api.root / "huge", 4096) > MEMORY
    status, kind, message = api.error(api.load("m", "huge"))
    assert (status, kind) == (503, "engine_refused")
    assert f"of {MEMORY}" in message
    assert right(api, "small", "mola")


# Clients


def test_an_adapter_is_unloaded_while_two_samples_of_it_are_streamed(api: Api) -> None:
    """Until they were running when it went; what a client gets must be right every time."""
    prompt = PROMPTS["mola"]

    def scenario() -> bool:
        assert api.load("m", "mola").status_code == 200
        stream = api.openai.completions.create(
            model="m",
            prompt=prompt["prompt_token_ids"],
            max_tokens=1000,
            n=2,
            stream=True,
            extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
        )
        found: dict[int, list[int]] = {0: [], 1: []}
        running = None
        for chunk in stream:
            for choice in chunk.choices:
                found[choice.index] += choice.token_ids or ()
            if running is None:
                running = api.unload("m").json()["requests_in_flight"]
        assert [len(tokens) for tokens in found.values()] == [1000, 1000]
        assert found[0] == found[1]
        assert found[0][:12] == prompt["greedy_token_ids"]
        assert "m" not in api.models()
        assert eventually(lambda: not any('"m"' in sample for sample in api.metrics()))
        return bool(running)

    assert any(scenario() for _ in range(ATTEMPTS))


def test_of_two_loads_of_one_name_at_once_one_wins_and_the_other_is_told(api: Api) -> None:
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda case: api.load("m", case), ("mola", "mixlora")))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 400]
        winner = next(answer.json() for answer in answers if answer.status_code == 200)
        loser = next(answer for answer in answers if answer.status_code == 400)
        assert api.error(loser)[1] == "already_loaded"
        assert right(api, "m", winner["kind"])
        assert api.unload("m").status_code == 200


def test_a_client_that_hangs_up_in_the_middle_of_its_load_leaves_it_whole(api: Api) -> None:
    body = json.dumps({"name": "m", "source": "mixlora"})
    host, port = httpx.URL(api.url).host, httpx.URL(api.url).port
    with socket.create_connection((host, port)) as connection:
        head = (
            "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        connection.sendall(head.encode())
    assert eventually(lambda: "m" in api.models())
    assert right(api, "m", "mixlora")


def test_adapters_are_loaded_under_saturation_without_a_failed_request(api: Api) -> None:
    """Three clients for each seat; every answer is the right one of its adapter."""
    assert api.load("lora", "lora").status_code == 200
    served = ["lora"]
    done = threading.Event()

    def ask(client: int) -> Counter[str]:
        asked: Counter[str] = Counter()
        while not done.is_set():
            case = served[(client + asked.total()) % len(served)]
            prompt = PROMPTS[case]
            assert api.greedy(case, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
            asked[case] += 1
        return asked

    with ThreadPoolExecutor(3 * SEATS) as pool:
        clients = [pool.submit(ask, client) for client in range(3 * SEATS)]
        try:
            for case in CASES[1:]:
                assert api.load(case, case).status_code == 200
                served.append(case)
                time.sleep(0.5)
        finally:
            done.set()
        total = sum((client.result() for client in clients), Counter())
    assert set(total) == set(CASES)


CYCLES, WARM = 1000, 100


def test_a_thousand_loads_and_unloads_leave_memory_flat(api: Api, server: Server) -> None:
    """A tenth of the cycles warms caches up. If the rest kept a quarter of their adapters, or as
    much of anything else, it would show."""

    def cycle() -> int:
        body = {"name": "m", "source": "mola", "allow_noop": True}
        answer = api.http.post("/v1/adapters", json=body)
        assert answer.status_code == 200
        assert api.http.delete("/v1/adapters/m").status_code == 200
        size: int = answer.json()["bytes"]
        return size

    def memory() -> int:
        return resident_memory(psutil.Process(server.process.pid))

    for _ in range(WARM):
        size = cycle()
    warm = memory()
    for _ in range(CYCLES - WARM):
        cycle()
    assert memory() - warm < (CYCLES - WARM) * size / 4


# Last: it ends the server.


def test_a_worker_that_is_killed_during_a_load_is_told_at_once(shared: Api, server: Server) -> None:
    """Stopped first, so that the load is surely under way."""
    worker = worker_of(server)
    worker.suspend()
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(shared.load, "m", "mola")
        listed = shared.http.get
        assert eventually(lambda: listed("/v1/adapters/m").json().get("stage") == "installing")
        worker.send_signal(signal.SIGKILL)
        start = time.monotonic()
        assert eventually(lambda: health(server) == 503)
        assert time.monotonic() - start < 10
        assert loading.result(30).status_code == 503
    # It ends by itself, so that whoever watches over it starts another.
    assert eventually(lambda: server.process.poll() is not None)


def health(server: Server) -> int:
    """0 where nobody listens any more."""
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code
    except httpx.TransportError:
        return 0
