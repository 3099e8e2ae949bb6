"""Faults of disks, memory and clients, against a real server that goes on as before.

What cannot be survived, the death of a worker, comes last: it must be told at once.
"""

import itertools
import json
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from support import big_adapter
from support.api_client import (
    BASE,
    KEY,
    PATIENCE_SECONDS,
    Api,
    Running,
    copy_adapter,
    eventually,
    oracle,
)
from support.limits import limited
from support.server import TINY, Server, serve

CASES = ("lora", "mola", "mixlora", "dynmole-soft", "loramoe", "dynmole-default")
PROMPTS = {case: oracle(case)["prompts"][0] for case in CASES} | {
    BASE: oracle("base")["prompts"][0]
}

MEGABYTE = 1 << 20
# Of one adapter, and of all of them in the worker.
LARGEST, MEMORY = 256 * MEGABYTE, 64 * MEGABYTE
SEATS, SLOTS = 4, 2
LONGEST = 16384
# Tokens of a request that a test does not wait for: they take a minute. Of one that it does.
ENDLESS, STREAMED = LONGEST - 100, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result: Path = tmp_path_factory.mktemp("faults")
    for case in CASES:
        copy_adapter(case, result / "root" / case)
    return result


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    """Few seats in a batch and fewer slots, so that a handful of clients fills them."""
    arguments = [
        *(*TINY, "--max-model-len", str(LONGEST), "--served-model-name", BASE, "--api-key", KEY),
        *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
        *("--max-num-seqs", str(SEATS), "--max-loras", str(SLOTS)),
        *("--adapter-memory", str(MEMORY)),
        *("--max-adapter-bytes", str(LARGEST)),
    ]
    with serve(model, folder / "log", arguments) as result:
        yield result


@pytest.fixture(scope="module")
def shared(server: Server, folder: Path) -> Api:
    return Api(server.url, folder / "root", folder / "store")


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    """Whatever the test did: the base and an adapter answer as they should, nothing is left."""
    yield shared
    for name in set(shared.models()) - {BASE}:
        assert shared.unload(name).status_code == 200
    assert right(shared, BASE, "base")
    assert shared.load("after", "mola").json()["status"] == "loaded"
    assert right(shared, "after", "mola")
    assert shared.unload("after").status_code == 200
    assert eventually(lambda: [path.name for path in shared.store.iterdir()] == ["manifest.json"])


def right(api: Api, name: str, case: str) -> bool:
    prompt = oracle(case)["prompts"][0]
    return api.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def worker_of(server: Server) -> psutil.Process:
    """The one process of the server that holds the model: nobody else's parent."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    named = [child for child in family if "Worker" in " ".join([child.name(), *child.cmdline()])]
    assert len(named) == 1, [(child.pid, child.name(), child.cmdline()) for child in family]
    return named[0]


def test_its_start_was_answered_from_the_first_to_the_last_stage(server: Server) -> None:
    """A start as users have it. Until it serves, a server says 503 and what it does, and it never
    refuses once it listens."""
    assert server.refusals == 0
    assert server.stages[0] == "starting the engine"
    assert "loading the base model" in server.stages
    assert not any("/" in stage for stage in server.stages)


# Disk and memory


@pytest.fixture(scope="module")
def big(folder: Path) -> int:
    """Bytes of the adapter `big`, which fits."""
    return big_adapter.save(folder / "root" / "big", 32)


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
    assert big_adapter.save(api.root / "huge", 64) > MEMORY
    status, kind, message = api.error(api.load("m", "huge"))
    assert (status, kind) == (503, "engine_refused")
    assert f"of {MEMORY}" in message
    assert right(api, "small", "mola")


# Clients


def ask(
    api: Api, model: str, case: str, tokens: int, samples: int = 1, stream: bool = False
) -> Iterator[tuple[int, list[int]]]:
    """Greedy tokens of the case's prompt as they come, with the number of their sample."""
    answer = api.openai.completions.create(
        model=model,
        prompt=PROMPTS[case]["prompt_token_ids"],
        max_tokens=tokens,
        n=samples,
        stream=stream,
        extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
    )
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            yield choice.index, list(choice.token_ids or ())


def joined(parts: Iterable[tuple[int, list[int]]]) -> list[list[int]]:
    """The tokens of each sample."""
    result: dict[int, list[int]] = {}
    for sample, tokens in parts:
        result.setdefault(sample, []).extend(tokens)
    return [result[sample] for sample in sorted(result)]


def test_an_adapter_is_unloaded_while_two_samples_of_it_are_streamed(api: Api) -> None:
    assert api.load("m", "mola").status_code == 200
    stream = ask(api, "m", "mola", STREAMED, samples=2, stream=True)
    begun = next(stream)
    assert api.unload("m").json()["requests_in_flight"] == 1
    one, other = joined([begun, *stream])
    assert one == other
    assert len(one) == STREAMED
    assert one[:12] == PROMPTS["mola"]["greedy_token_ids"]
    assert "m" not in api.models()
    assert eventually(lambda: not any('"m"' in sample for sample in api.metrics()))


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


# Saturation

TOKENS = 12
# (samples, streamed)
WAYS = ((1, False), (2, False), (1, True), (2, True))


def test_under_saturation_every_answer_is_what_it_was_before(api: Api) -> None:
    """Three clients for each seat and three adapters for each slot, while adapters are loaded and
    unloaded."""
    quiet = {}
    for case in CASES:
        assert api.load(case, case).status_code == 200
        quiet[case] = joined(ask(api, case, case, TOKENS))
        assert quiet[case][0][:12] == PROMPTS[case]["greedy_token_ids"]
        assert api.unload(case).status_code == 200
    quiet[BASE] = joined(ask(api, BASE, BASE, TOKENS))
    served = [BASE]
    done = threading.Event()

    def client(number: int) -> set[str]:
        asked = set()
        for turn in itertools.count(number):
            if done.is_set():
                return asked
            case = served[turn % len(served)]
            samples, streamed = WAYS[turn // len(served) % len(WAYS)]
            assert joined(ask(api, case, case, TOKENS, samples, streamed)) == quiet[case] * samples
            asked.add(case)
        raise AssertionError

    with ThreadPoolExecutor(3 * SEATS) as pool:
        clients = [pool.submit(client, number) for number in range(3 * SEATS)]
        try:
            for case in CASES:
                assert api.load(case, case).status_code == 200
                served.append(case)
            for case in ("mola", "mixlora"):
                assert api.load("passing", case).status_code == 200
                stream = ask(api, "passing", case, TOKENS, samples=2, stream=True)
                begun = next(stream)
                assert api.unload("passing").status_code == 200
                assert joined([begun, *stream]) == quiet[case] * 2
        finally:
            done.set()
        asked = set().union(*(client.result() for client in clients))
    assert asked == set(served)


def test_the_base_answers_while_an_adapter_waits_for_a_slot(api: Api) -> None:
    """All slots are held by streams that run far longer than all the rest takes."""
    *holding, waiting = CASES[: SLOTS + 1]
    for case in (waiting, *holding):
        assert api.load(case, case).status_code == 200
    ids = PROMPTS[BASE]["prompt_token_ids"]

    streams = [Running(api, case, ids, ENDLESS) for case in holding]
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(right, api, waiting, waiting)
        try:
            assert eventually(lambda: queued.done() or in_flight(api, waiting))
            assert all(right(api, BASE, "base") for _ in range(8))
            assert not queued.done()
        finally:
            for stream in streams:
                stream.disconnect()
        assert queued.result()


def in_flight(api: Api, name: str) -> float:
    return api.of_adapter(name, "adapter_requests_in_flight")


# Memory over time

LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"
WARM = 12
# Bytes by which a process may have grown after so many cycles.
LEFT = {15: 3 * MEGABYTE, 1000: 6 * MEGABYTE}


@pytest.mark.parametrize(
    "cycles",
    [
        15,
        pytest.param(
            1000,
            marks=pytest.mark.skipif(not LONG, reason="minutes; MOLEHILL_LONG_TESTS=1 runs it"),
        ),
    ],
)
def test_loads_and_unloads_leave_memory_flat(
    api: Api, server: Server, cycles: int, record_property: Callable[[str, object], None]
) -> None:
    """Every cycle loads, probes and unloads 0.8 MB; some replace, ask and scrape as well."""
    processes = {"api": psutil.Process(server.process.pid), "worker": worker_of(server)}

    def cycle(number: int) -> None:
        cases = ("dynmole-default", "mixlora") if number % 5 == 0 else ("dynmole-default",)
        for case in cases:
            answer = api.http.post("/v1/adapters", json={"name": "m", "source": case})
            assert answer.status_code == 200
        if number % 5 == 0:
            assert right(api, "m", cases[-1])
            api.metrics()
        assert api.http.delete("/v1/adapters/m").status_code == 200

    def memory() -> dict[str, int]:
        return {name: process.memory_info().rss for name, process in processes.items()}

    for number in range(WARM):
        cycle(number)
    before = memory()
    for number in range(cycles):
        cycle(number)
    grown = {name: value - before[name] for name, value in memory().items()}
    record_property("grown", grown)
    assert max(grown.values()) < LEFT[cycles], grown


# Last: it ends the server.


def test_a_worker_that_is_killed_during_a_load_is_told_at_once(shared: Api, server: Server) -> None:
    """By /health, the client of the load, and the readers of a stream that was running.

    The worker is stopped first, so that the load is surely under way.
    """
    worker = worker_of(server)
    stream = ask(shared, BASE, BASE, ENDLESS, samples=2, stream=True)
    next(stream)
    worker.suspend()
    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(joined, stream)
        loading = pool.submit(shared.load, "m", "mola")
        listed = shared.http.get
        assert eventually(lambda: listed("/v1/adapters/m").json().get("stage") == "installing")
        assert not streaming.done()
        worker.kill()
        # Nobody waits for ever: what is not told is waited for until the test gives up.
        assert eventually(lambda: health(server) == 503, pause=0.01)
        assert loading.result(PATIENCE_SECONDS).status_code == 503
        # An error in the stream, or a connection that ends before the stream does.
        assert isinstance(
            streaming.exception(PATIENCE_SECONDS), (openai.APIError, httpx.TransportError)
        )
    # It ends by itself, so that whoever watches over it starts another.
    assert eventually(lambda: server.process.poll() is not None)


def health(server: Server) -> int:
    """0 where nobody listens any more."""
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code
    except httpx.TransportError:
        return 0
