"""Two engines in one server: adapters are in both or in none.

What cannot be survived, the death of an engine, comes last.
"""

import base64
import io
import itertools
import json
import re
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from support import big_adapter, share
from support.api_client import BASE, EXTRA_VOCAB, KEY, Api, copy_adapter, eventually, oracle
from support.golden import Case
from support.limits import limited
from support.server import TINY, Server, serve
from support.trained_tokens import ADDED, STEPS, train

from molehill.engine.adapter.model import layer_of

CASES = ("lora", "mola", "mixlora", "dynmole-soft", "loramoe", "dynmole-default")
ENGINES = (0, 1)
STRAGGLER_SECONDS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result: Path = tmp_path_factory.mktemp("engines")
    for case in CASES:
        copy_adapter(case, result / "root" / case)
    return result


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    arguments = [
        *(*TINY, "--served-model-name", BASE, "--api-key", KEY, "--max-num-seqs", "8"),
        *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
        *("--data-parallel-size", str(len(ENGINES)), "--max-loras", "8"),
        *("--straggler-timeout", str(STRAGGLER_SECONDS)),
        *("--enable-return-routed-experts", "--enable-scale-out"),
        *("--extra-vocab", str(EXTRA_VOCAB)),
    ]
    # vLLM binds the engines of a machine to its memory's nodes, of which there may be one.
    cores = share.cores()
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"} if cores else {}
    with serve(model, folder / "log", arguments, environment, warm=True) as result:
        yield result


@pytest.fixture(scope="module")
def shared(server: Server, folder: Path) -> Api:
    return Api(server.url, folder / "root", folder / "store")


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    """Nothing is left in any engine."""
    yield shared
    for name in set(shared.models()) - {BASE}:
        assert shared.unload(name).status_code == 200
    assert eventually(lambda: engines(shared) == [(0, 0), (0, 0)])


def engines(api: Api) -> list[tuple[int, int]]:
    """Of each engine, adapters in its slots and the bytes that they take."""
    report = api.http.get("/v1/routing").json()["engines"]
    assert [engine["engine"] for engine in report] == list(ENGINES)
    return [(engine["adapters"], engine["resident_bytes"]) for engine in report]


def workers_of(server: Server) -> list[psutil.Process]:
    """One per engine, in the order of their ranks, as the log names them."""
    log = server.log.read_text(errors="replace")
    engines = dict(re.findall(r"EngineCore_DP(\d+) pid=(\d+)", log))
    workers = {int(pid) for pid in re.findall(r"Worker pid=(\d+)", log)}
    assert sorted(map(int, engines)) == list(ENGINES)
    result = []
    for rank in ENGINES:
        children = psutil.Process(int(engines[str(rank)])).children()
        (worker,) = [child for child in children if child.pid in workers]
        result.append(worker)
    return result


def right(api: Api, name: str, case: str, rank: int | None = None) -> bool:
    """rank: of the engine that is to answer; vLLM chooses one otherwise."""
    prompt = oracle(case)["prompts"][0]
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    answer = api.complete(name, prompt["prompt_token_ids"], extra_headers=headers)
    return bool(answer.choices[0].token_ids == prompt["greedy_token_ids"])


def on_both(api: Api, name: str, case: str) -> bool:
    return all(right(api, name, case, rank) for rank in ENGINES)


def test_adapters_are_loaded_into_both_engines_under_traffic_and_answer_there(api: Api) -> None:
    served = [BASE]
    done = threading.Event()

    def client(number: int) -> set[str]:
        asked = set()
        for turn in itertools.count(number):
            if done.is_set():
                return asked
            case = served[turn % len(served)]
            assert right(api, case, "base" if case == BASE else case)
            asked.add(case)
        raise AssertionError

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for number, case in enumerate(CASES, 1):
                assert api.load(case, case).json()["status"] == "loaded"
                served.append(case)
                (first, bytes_there), second = engines(api)
                assert (first, bytes_there) == second
                assert first == number
            for case in CASES:
                assert on_both(api, case, case)
            # Another generation takes a name in both.
            assert api.load("swapped", "lora").status_code == 200
            replaced = api.load("swapped", "mola", load_inplace=True)
            assert replaced.json()["status"] == "replaced"
            assert on_both(api, "swapped", "mola")
        finally:
            done.set()
        asked = set().union(*(client.result() for client in clients))
    assert len(asked) > 1
    samples = api.metrics()
    for case in CASES:
        each = [
            samples[f'molehill_engine_adapter_tokens_total{{adapter="{case}",engine="{rank}"}}']
            for rank in ENGINES
        ]
        assert min(each) > 0
        assert sum(each) == api.of_adapter(case, "adapter_tokens_total")
        held = [
            samples[
                "molehill_engine_adapter_resident_bytes"
                f'{{adapter="{case}",engine="{rank}",tier="worker"}}'
            ]
            for rank in ENGINES
        ]
        label = f'{{adapter="{case}",tier="worker"}}'
        assert sum(held) == samples[f"molehill_adapter_resident_bytes{label}"]
    tokens = api.http.get("/v1/adapters/mola/routing").json()["tokens"]
    assert tokens == api.of_adapter("mola", "adapter_tokens_total")


def test_both_engines_answer_with_added_tokens(api: Api, folder: Path) -> None:
    """As PEFT does with the adapter; the base's answers of the same engine have none of them."""
    pytest.importorskip("peft", reason="the dev extra is not installed")
    adapter = train(folder / "root", "thinks", "grown-saved", ("<think>", "<|end|>"))
    loaded = api.http.post("/v1/adapters", json={"name": "thinks", "source": "thinks"})
    assert loaded.json()["vocabulary"]["added_tokens"] == ADDED
    asked = {"max_tokens": STEPS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for rank in ENGINES:
        headers = {"X-data-parallel-rank": str(rank)}

        def ask(model: str, headers: Any = headers, **more: Any) -> Any:
            body = {**asked, "model": model, "prompt": adapter.prompt, **more}
            answer = api.http.post("/v1/completions", json=body, headers=headers)
            return answer.json()["choices"][0]

        with ThreadPoolExecutor(2) as pool:
            of_it, of_base = pool.map(ask, ("thinks", BASE))
        assert tuple(of_it["token_ids"]) == adapter.greedy
        assert set(of_it["prompt_token_ids"]) > set(ADDED)
        assert max(of_base["prompt_token_ids"] + of_base["token_ids"]) < min(ADDED)
        forced = ask("thinks", logit_bias={str(ADDED[0]): 100.0}, skip_special_tokens=False)
        assert forced["text"] == adapter.tokenizer.decode([ADDED[0]] * STEPS)


def test_the_engine_that_answers_tells_its_routing(api: Api) -> None:
    assert api.load("soft", "dynmole-soft").status_code == 200
    body = {
        "model": "soft",
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "ignore_eos": True,
        "temperature": 0,
        "molehill": {"routing": True, "usage": True},
    }
    report, bills = [], []
    for rank in ENGINES:
        headers = {"X-data-parallel-rank": str(rank)}
        answer = api.http.post("/v1/completions", json=body, headers=headers).json()
        report.append(answer["choices"][0]["molehill"]["routing"])
        bills.append(answer["usage"]["molehill"])
    assert report[0] == report[1]
    experts = np.frombuffer(base64.b64decode(report[0]["experts"]), "<i2")
    assert (experts.reshape(report[0]["shape"])[..., 0] >= 0).all()
    assert bills[0] == bills[1]
    assert bills[0]["tokens"] == 6


def test_a_request_that_asks_for_its_routing_waits_for_its_own_engine_alone(
    api: Api, server: Server
) -> None:
    assert api.load("soft", "dynmole-soft").status_code == 200
    body = {"model": "soft", "prompt": [5, 6, 7], "max_tokens": 4, "molehill": {"routing": True}}
    second = workers_of(server)[1]
    second.suspend()
    try:
        headers = {"X-data-parallel-rank": "0"}
        answer = api.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["molehill"]["routing"]["shape"][0] >= 3
    finally:
        second.resume()


def test_a_mixtures_choices_are_vllms_routed_experts(api: Api) -> None:
    """On every route that has the field, in vLLM's encoding, whichever engine answers."""
    prompt = oracle("mixlora")["prompts"][0]
    ids, tokens = prompt["prompt_token_ids"], 5
    for case in ("mixlora", "mola", "dynmole-soft"):
        assert api.load(case, case).status_code == 200
    body = {"model": "mixlora", "prompt": ids, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True}
    sampled = {**body, "temperature": 1.0, "n": 2}
    choices = [
        choice
        for asked in (sampled, body)
        for choice in api.http.post(
            "/v1/completions", json={**asked, "molehill": {"routing": True}}
        ).json()["choices"]
    ]
    assert len(choices) == 3
    for choice in choices:
        given = routed_experts(choice)
        assert (given.dtype, given.shape) == (np.uint8, (len(ids) + tokens - 1, 4, 2))
        routing = choice["molehill"]["routing"]
        chosen = np.frombuffer(base64.b64decode(routing["experts"]), "<i2")
        assert (given == chosen.reshape(routing["shape"])).all()
    for site, route in Case("mixlora").routes().items():
        assert len(route["w"]) == len(ids)
        for row, wanted in zip(given[:, layer_of(site)], route["w"], strict=False):
            assert set(row.tolist()) == set(wanted.nonzero().flatten().tolist())
    later = api.http.post("/v1/completions", json={**body, "routed_experts_prompt_start": 3})
    assert (routed_experts(later.json()["choices"][0]) == given[3:]).all()
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    asked = {"model": "mixlora", "token_ids": ids, "sampling_params": sampling}
    answer = api.http.post("/inference/v1/generate", json=asked).json()
    assert (routed_experts(answer["choices"][0]) == given).all()
    stream = api.http.post("/inference/v1/generate", json={**asked, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if "choices" in line]
    parts = [choice for line in lines for choice in json.loads(line)["choices"]]
    with_field = [choice for choice in parts if choice["routed_experts"] is not None]
    assert with_field == parts[-1:]
    assert (routed_experts(parts[-1]) == given).all()
    chat: dict[str, Any] = {
        "model": "mixlora",
        "messages": [{"role": "user", "content": "The lamp"}],
    }
    chat |= {"max_tokens": tokens, "ignore_eos": True}
    answer = api.http.post("/v1/chat/completions", json=chat).json()
    read = answer["usage"]["total_tokens"] - 1
    assert routed_experts(answer["choices"][0]).shape == (read, 4, 2)
    # The routers of a layer side by side; nothing of what has no such shape, and of the base.
    answer = api.http.post("/v1/completions", json={**body, "model": "mola"}).json()
    assert routed_experts(answer["choices"][0]).shape == (len(ids) + tokens - 1, 4, 6)
    for model in ("dynmole-soft", BASE):
        answer = api.http.post("/v1/completions", json={**body, "model": model}).json()
        assert answer["choices"][0]["routed_experts"] is None
    laid_out = {
        name: api.http.get(f"/v1/adapters/{name}").json()["routing"]["routed_experts"]
        for name in ("mixlora", "mola", "dynmole-soft")
    }
    assert laid_out["mixlora"]["columns"] == [0] * 4
    assert (laid_out["mola"]["shape"], laid_out["mola"]["dtype"]) == ([4, 6], "uint8")
    assert laid_out["mola"]["columns"] == [0, 2, 4] * 4
    assert "hangs on the token" in laid_out["dynmole-soft"]["refusal"]


def routed_experts(choice: dict[str, Any]) -> NDArray[Any]:
    """As vLLM's protocol says that it is decoded."""
    array: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    return array


def test_a_pin_and_an_eviction_hold_in_both_engines(api: Api) -> None:
    body = {"name": "pinned", "source": "mixlora", "pinned": True}
    assert api.http.post("/v1/adapters", json=body).status_code == 200
    for number in range(9):
        assert api.load(f"m{number}", "mola").status_code == 200
        assert right(api, f"m{number}", "mola")
    (first, bytes_there), second = engines(api)
    assert (first, bytes_there) == second
    assert first == 8
    assert api.http.get("/v1/adapters/pinned").json()["resident"]
    assert on_both(api, "pinned", "mixlora")
    assert on_both(api, "m0", "mola")


def test_an_adapter_that_one_engine_refuses_is_in_none(
    api: Api, server: Server, folder: Path
) -> None:
    big = big_adapter.save(folder / "root" / "big", 32)
    second = workers_of(server)[1]
    assert api.load("other", "lora").status_code == 200
    before = engines(api)
    with limited(second.pid, resource.RLIMIT_AS, second.memory_info().vms + big // 2):
        status, kind, message = api.error(api.load("m", "big"))
    assert (status, kind) == (503, "engine_refused")
    assert "memory" in message
    assert "m" not in api.models()
    assert engines(api) == before
    assert on_both(api, "other", "lora")
    assert api.load("m", "big").status_code == 200
    (adapters, _), other = engines(api)
    assert adapters == other[0] == 2


def test_an_engine_that_falls_behind_ends_the_load_and_has_nothing_of_it_later(
    api: Api, server: Server
) -> None:
    second = workers_of(server)[1]
    second.suspend()
    try:
        status, kind, message = api.error(api.load("m", "mola"))
        assert (status, kind) == (503, "engine_refused")
        assert "engines [1]" in message
        assert "m" not in api.models()
        assert right(api, BASE, "base", rank=0)
    finally:
        second.resume()
    assert eventually(lambda: on_both(api, BASE, "base"))
    assert eventually(lambda: engines(api) == [(0, 0), (0, 0)])
    assert api.load("m", "mola").status_code == 200
    assert on_both(api, "m", "mola")


# Last: it ends the server.


def test_an_engine_that_dies_is_told_by_health_and_ends_the_server(
    shared: Api, server: Server
) -> None:
    assert shared.load("m", "mola").status_code == 200
    workers_of(server)[1].send_signal(signal.SIGKILL)
    assert eventually(lambda: health(server) == 503, pause=0.01)
    assert eventually(lambda: server.process.poll() is not None)


def health(server: Server) -> int:
    """0 where nobody listens any more."""
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code
    except httpx.TransportError:
        return 0
