"""Two processes that answer clients of one server: one owns the registry, the other follows it.

What cannot be survived, the death of a process, comes last.
"""

import itertools
import json
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.api_client import BASE, KEY, Api, copy_adapter, edit_config, eventually, oracle
from support.golden import TINY_LLAMA
from support.server import TINY, Server, serve
from support.uploads import files_of, safetensors_of
from transformers import AutoTokenizer

CASES = ("lora", "mola", "mixlora", "dynmole-soft")
OWNER, FOLLOWER = 0, 1
GENERATION = "Molehill-Generation"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "The lamp and the map"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result: Path = tmp_path_factory.mktemp("processes")
    for case in (*CASES, "alora"):
        copy_adapter(case, result / "root" / case)
    return result


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    arguments = [
        *(*TINY, "--served-model-name", BASE, "--api-key", KEY, "--api-server-count", "2"),
        *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
        # Fewer slots than adapters: requests wait for each other's, whoever has them.
        *("--max-loras", "3", "--adapter", f"started={folder / 'root' / 'lora'}"),
    ]
    # A connection stays with its process.
    environment = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
    with serve(model, folder / "log", arguments, environment, warm=True) as result:
        yield result


@pytest.fixture(scope="module")
def shared(server: Server, folder: Path) -> Api:
    return Api(server.url, folder / "root", folder / "store")


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    """Nothing is left in the engine but what was there at the start."""
    yield shared
    for name in set(shared.models()) - {BASE, "started"}:
        assert shared.unload(name).status_code == 200


def processes_of(server: Server) -> list[psutil.Process]:
    """The owner and the follower, as the log names them."""
    log = server.log.read_text(errors="replace")
    pids = dict(re.findall(r"\(ApiServer_(\d) pid=(\d+)\)", log))
    return [psutil.Process(int(pids[str(index)])) for index in (OWNER, FOLLOWER)]


def has_connection(process: psutil.Process, port: int) -> bool:
    return any(there.raddr and there.raddr.port == port for there in process.net_connections("tcp"))


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[list[httpx.Client]]:
    """Of the owner and of the follower: each has one connection, which is that process's."""
    processes = processes_of(server)
    found: dict[int, httpx.Client] = {}
    opened = []
    while len(found) < len(processes):
        client = httpx.Client(
            base_url=server.url,
            headers=HEADERS,
            timeout=60,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=None),
        )
        opened.append(client)
        answer = client.get("/v1/models")
        port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
        (index,) = [i for i, process in enumerate(processes) if has_connection(process, port)]
        found.setdefault(index, client)
    yield [found[index] for index in (OWNER, FOLLOWER)]
    for client in opened:
        client.close()


def complete(client: httpx.Client, name: str, prompt: Any, tokens: int = 12, **more: Any) -> Any:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    return client.post("/v1/completions", json=body)


def check_right(client: httpx.Client, name: str, case: str) -> httpx.Response:
    prompt = oracle(case)["prompts"][0]
    answer: httpx.Response = complete(client, name, prompt["prompt_token_ids"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == prompt["greedy_token_ids"]
    return answer


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["message"]


def test_a_start_is_answered_until_both_processes_serve(server: Server) -> None:
    assert server.refusals == 0
    # Each may be over between two looks.
    assert {"loading the base model", "setting up the KV cache"} & set(server.stages)


def test_adapters_are_loaded_under_traffic_of_both_and_are_the_same_in_both(
    api: Api, clients: list[httpx.Client]
) -> None:
    served = [(BASE, "base"), ("started", "lora")]
    done = threading.Event()

    def ask(client: httpx.Client) -> None:
        asked: set[str] = set()
        for turn in itertools.count():
            if done.is_set() and asked >= {BASE, "started", *CASES}:
                return
            name, case = served[turn % len(served)]
            check_right(client, name, case)
            asked.add(name)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, client) for client in clients]
        try:
            for case in CASES:
                assert api.load(case, case).json()["status"] == "loaded"
                served.append((case, case))
            with ThreadPoolExecutor(6) as others:
                list(others.map(lambda case: api.greedy(case, [5, 6, 7]), CASES * 3))
        finally:
            done.set()
        for asked in asking:
            asked.result()
    listed = [client.get("/v1/adapters").json()["data"] for client in clients]
    assert [info["name"] for info in listed[OWNER]] == [info["name"] for info in listed[FOLLOWER]]
    generations = {info["name"]: info["generation"] for info in listed[OWNER]}
    for case in CASES:
        for client in clients:
            assert check_right(client, case, case).headers[GENERATION] == generations[case]


def test_an_unload_is_seen_by_both_before_it_answers(api: Api, clients: list[httpx.Client]) -> None:
    refusals = []
    for changing in (*clients, *clients):
        assert api.load("gone", "mola").status_code == 200
        for client in clients:
            check_right(client, "gone", "mola")
        body = {"lora_name": "gone"}
        assert changing.post("/v1/unload_lora_adapter", json=body).status_code == 200
        refusals += [error_of(complete(client, "gone", [5])) for client in clients]
    status, kind, message = refusals[0]
    assert (status, kind) == (404, "NotFoundError")
    assert f"The model `gone` does not exist. Valid aliases: {BASE}, started" in message
    assert refusals == [refusals[0]] * len(refusals)


def test_a_request_ends_on_the_generation_that_it_began_on(
    api: Api, clients: list[httpx.Client]
) -> None:
    prompt = oracle("mixlora")["prompts"][0]["prompt_token_ids"]
    assert api.load("swapped", "mixlora").status_code == 200
    long = complete(clients[FOLLOWER], "swapped", prompt, 100).json()["choices"][0]["token_ids"]
    body = {"model": "swapped", "prompt": prompt, "max_tokens": 100, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": True}
    with clients[FOLLOWER].stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        streamed = token_ids(next(lines))
        old = answer.headers[GENERATION]
        assert api.load("swapped", "mola", load_inplace=True).json()["status"] == "replaced"
        new = check_right(clients[OWNER], "swapped", "mola").headers[GENERATION]
        for line in lines:
            streamed += token_ids(line)
    assert streamed == long
    assert old != new
    assert check_right(clients[FOLLOWER], "swapped", "mola").headers[GENERATION] == new
    # With its last request the old one has gone.
    assert eventually(lambda: not (api.store / old).exists())
    assert (api.store / new).exists()


def token_ids(line: str) -> list[int]:
    text = line.removeprefix("data: ")
    if not text.startswith("{"):
        return []
    return [token for choice in json.loads(text)["choices"] for token in choice["token_ids"] or ()]


def samples(client: httpx.Client) -> dict[tuple[str, str], float]:
    """By name and the adapter's or the handler's label, summed over the others."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = sample.labels
            label = labels.get("adapter") or labels.get("handler") or ""
            key = sample.name, label
            found[key] = found.get(key, 0.0) + sample.value
    return found


def test_metrics_add_up_once_whoever_answers_and_whoever_is_asked_for_them(
    api: Api, clients: list[httpx.Client]
) -> None:
    assert api.load("counted", "mola").status_code == 200
    before = samples(clients[OWNER])
    for client, number in zip(clients, (3, 5), strict=True):
        for _ in range(number):
            assert complete(client, "counted", [5, 6, 7, 8], 4).status_code == 200
    assert complete(clients[FOLLOWER], "nobody", [5]).status_code == 404

    def grown(client: httpx.Client) -> dict[tuple[str, str], float]:
        now = samples(client)
        return {key: now[key] - before.get(key, 0) for key in now}

    expected = {
        ("molehill_adapter_cache_hits_total", "counted"): 8,
        ("vllm:request_success_total", ""): 8,
        ("vllm:prompt_tokens_total", ""): 8 * 4,
        ("vllm:generation_tokens_total", ""): 8 * 4,
        ("http_requests_total", "/v1/completions"): 9,
        # The last token of an answer is not read.
        ("molehill_adapter_tokens_total", "counted"): 8 * 7,
    }
    for client in clients:
        assert eventually(lambda client=client: grown(client).items() >= expected.items()), {
            key: grown(client).get(key) for key in expected
        }
    text = clients[FOLLOWER].get("/metrics").text
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))
    assert api.unload("counted").status_code == 200
    for client in clients:
        assert "counted" not in client.get("/metrics").text
    assert api.load("counted", "mola").status_code == 200
    assert samples(clients[OWNER])["molehill_adapter_cache_hits_total", "counted"] == 0


def test_the_follower_has_the_owner_answer_what_only_the_owner_can(
    api: Api, clients: list[httpx.Client], folder: Path
) -> None:
    api.load("soft", "dynmole-soft")
    api.load("mola", "mola")
    for path in ("/v1/models", "/v1/models/soft", "/v1/adapters/soft", "/dashboard", "/version"):
        answers = [client.get(path) for client in clients]
        assert [answer.status_code for answer in answers] == [200, 200]
        # vLLM makes up an id for each answer's permissions.
        texts = [re.sub(r"modelperm-\w+", "", answer.text) for answer in answers]
        assert texts[OWNER] == texts[FOLLOWER]
        assert answers[OWNER].headers.keys() == answers[FOLLOWER].headers.keys()
    # Mixes are made by the owner, and it asks the workers for what routers chose.
    asked: list[dict[str, Any]] = [
        {"molehill": {"mix": {"soft": 0.5, "mola": 0.5}}},
        {"molehill": {"routing": True, "usage": True}},
        {"molehill": {"routing": True}, "stream": True},
        {"molehill": {"what": 1}},
    ]
    for more in asked:
        model = BASE if "mix" in more["molehill"] else "soft"
        texts = []
        for client in clients:
            answer = complete(client, model, [5, 6, 7], 4, **more)
            ids = r'"(id|created)":\s*("[^"]*"|\d+)'
            texts.append((answer.status_code, re.sub(ids, "", answer.text)))
        assert texts[OWNER] == texts[FOLLOWER]
    files = files_of(safetensors_of("lora", folder / "sent"))
    sent = clients[FOLLOWER].post("/v1/adapters", data={"name": "sent"}, files=files)
    assert sent.status_code == 200, sent.text
    for client in clients:
        check_right(client, "sent", "lora")


def test_each_process_asks_for_a_key(server: Server, clients: list[httpx.Client]) -> None:
    for client in clients:
        headers = {"Authorization": "Bearer wrong"}
        for answer in (
            client.get("/v1/models", headers=headers),
            client.post("/v1/completions", json={"model": BASE}, headers=headers),
            client.delete("/v1/adapters/started", headers=headers),
        ):
            assert answer.status_code == 401
        assert client.get("/health", headers=headers).status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_limits_are_of_all_processes_together(api: Api, clients: list[httpx.Client]) -> None:
    limits = {"requests_in_flight": 1}
    body = {"name": "limited", "source": "lora", "limits": limits}
    assert api.http.post("/v1/adapters", json=body).status_code == 200
    refusals = []
    for running, asking in (clients, clients[::-1]):
        long = {"model": "limited", "prompt": [5], "max_tokens": 60, "ignore_eos": True}
        streamed = {**long, "stream": True}
        with running.stream("POST", "/v1/completions", json=streamed) as answer:
            lines = answer.iter_lines()
            next(lines)
            refusals.append(complete(asking, "limited", [5]))
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert eventually(lambda asking=asking: complete(asking, "limited", [5]).status_code == 200)
    assert error_of(refusals[0]) == error_of(refusals[1])
    assert [(r.status_code, r.headers["Retry-After"]) for r in refusals] == [(429, "1")] * 2


def test_nothing_is_held_for_clients_that_have_gone(api: Api, server: Server) -> None:
    body = {"name": "limited", "source": "lora", "limits": {"requests_in_flight": 1}}
    assert api.http.post("/v1/adapters", json=body).status_code == 200
    long = {"model": "limited", "prompt": [5], "max_tokens": 400, "stream": True}
    requests = {"json": {**long, "ignore_eos": True}, "headers": HEADERS}

    def begins_and_goes() -> bool:
        with httpx.stream("POST", f"{server.url}/v1/completions", **requests) as answer:
            return answer.status_code == 200 and next(answer.iter_lines()) is not None

    # Of one process or the other, as connections come.
    for _ in range(6):
        assert eventually(begins_and_goes)
    assert api.unload("limited").status_code == 200
    assert eventually(lambda: "limited" not in api.http.get("/metrics").text)


def test_an_adapters_invocation_and_template_hold_in_both(
    api: Api, clients: list[httpx.Client]
) -> None:
    assert api.http.post("/v1/adapters", json={"name": "act", "source": "alora"}).status_code == 200
    prompts = oracle("alora")["prompts"]
    (absent, *_) = [p for p in prompts if p["invocation_start"] is None]
    (invoked, *_) = [p for p in prompts if p["invocation_start"] is not None]
    refusals = [complete(client, "act", absent["prompt_token_ids"]) for client in clients]
    assert error_of(refusals[OWNER]) == error_of(refusals[FOLLOWER])
    assert refusals[OWNER].status_code == 400
    answers = [complete(client, "act", invoked["prompt_token_ids"]) for client in clients]
    for answer in answers:
        assert answer.json()["choices"][0]["token_ids"] == invoked["greedy_token_ids"]
    again = {"name": "act", "source": "alora", "when_not_invoked": "base"}
    assert api.http.post("/v1/adapters", json=again).status_code == 200
    for client in clients:
        assert complete(client, "act", absent["prompt_token_ids"]).status_code == 200
    not_invoked = samples(clients[FOLLOWER])["molehill_requests_not_invoked_total", "act"]
    assert not_invoked == 4

    talking = copy_adapter("lora", api.root / "talking")
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(talking)
    edit_config(talking, lora_alpha=9)
    assert api.load("talking", "talking").status_code == 200
    body = {"model": "talking", "messages": MESSAGES}
    tokens = [client.post("/tokenize", json=body).json()["tokens"] for client in clients]
    base = [
        client.post("/tokenize", json={**body, "model": BASE}).json().get("tokens")
        for client in clients
    ]
    expected: Any = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert tokens == [list(expected["input_ids"] if hasattr(expected, "keys") else expected)] * 2
    assert base[OWNER] == base[FOLLOWER] != tokens[OWNER]


def test_a_process_that_dies_ends_the_server(server: Server, clients: list[httpx.Client]) -> None:
    processes = processes_of(server)
    family = {process.pid for process in processes}
    log = server.log.read_text(errors="replace")
    family |= {int(pid) for pid in re.findall(r"(?:EngineCore|Worker)\S* pid=(\d+)", log)}
    processes[FOLLOWER].send_signal(signal.SIGKILL)
    assert eventually(lambda: server.process.poll() is not None)
    assert server.process.returncode not in (0, None)
    assert eventually(lambda: not any(map(psutil.pid_exists, family)))
