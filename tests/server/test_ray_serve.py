"""The application of Ray Serve, started by `serve run`, with two replicas.

Ray is in an environment of its own, which has molehill too.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from support import share
from support.api_client import BASE, KEY, copy_adapter, eventually, oracle
from support.outcomes import ask, assert_only_begun_streams_were_lost, chat, while_lost
from support.proxies import found, needs
from support.server import TINY, free_port, stop

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        os.environ.get("MOLEHILL_LONG_TESTS") != "1",
        reason="two replicas that start as for users, minutes; MOLEHILL_LONG_TESTS=1 runs it",
    ),
    needs("serve"),
]

# By names below the folder of adapters, one more than a replica may have.
ADAPTERS = {"sql": "lora", "team/chat": "dynmole-soft", "third": "mola"}
PER_REPLICA = 2
START_SECONDS = 230
# Until Ray's routers know which adapters a replica has.
KNOWN_SECONDS = 3


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    serve = found("serve")
    assert serve is not None
    folder = tmp_path_factory.mktemp("ray")
    for name, case in ADAPTERS.items():
        copy_adapter(case, folder / "adapters" / name)
    port = free_port()
    arguments = {
        "model": str(model),
        "served_model_name": BASE,
        "adapters": str(folder / "adapters"),
        "max_adapters_per_replica": PER_REPLICA,
        "min_replicas": 2,
        "max_replicas": 2,
        "cpus_per_replica": 0.5,
        "drain_seconds": 5,
        "server_arguments": list(TINY),
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "molehill",
                "route_prefix": "/",
                "import_path": "molehill.api.ray.application:application",
                "args": arguments,
            }
        ],
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    environment = {
        **share.environment(),
        **{"VLLM_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    }
    with log.open("wb") as output:
        # Not in the checkout, whose folders Ray would put before the packages of their names.
        process = subprocess.Popen(
            [serve, "run", str(folder / "serve.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            process_group=0,
        )
    result = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(result):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield result
    finally:
        process.send_signal(signal.SIGINT)
        stop(process)
        # With Ray, all of the servers end.
        assert eventually(lambda: not servers())


def is_up(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and len(servers()) == 2


def servers() -> dict[int, str]:
    """The replicas' servers that are ready: their URLs by process."""
    result = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "molehill.api.ray.child" in command:
            result[process.pid] = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    return {pid: url for pid, url in result.items() if ready(url)}


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def adapters_of(url: str) -> set[str]:
    answer = httpx.get(f"{url}/v1/adapters", headers={"Authorization": f"Bearer {KEY}"})
    return {info["name"] for info in answer.json()["data"] if info["state"] == "serving"}


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


def greedy(client: openai.OpenAI, model: str, prompt: list[int]) -> list[int]:
    answer: Any = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return answer.choices[0].token_ids


def test_replicas_answer_for_adapters_by_name(client: openai.OpenAI) -> None:
    """And go on with those that have an adapter."""
    for name, case in {BASE: "base", **ADAPTERS}.items():
        prompt = oracle(case)["prompts"][0]
        for asked in (name, f"{BASE}:{name}" if name != BASE else name):
            tokens = greedy(client, asked, prompt["prompt_token_ids"])
            assert tokens == prompt["greedy_token_ids"]
    assert all(len(adapters_of(url)) <= PER_REPLICA for url in servers().values())
    name = "sql"
    chat(client, name)
    time.sleep(KNOWN_SECONDS)
    holders = {url for url in servers().values() if name in adapters_of(url)}
    for _ in range(10):
        chat(client, name)
    # Who has it is asked, and nobody else loads it.
    assert {url for url in servers().values() if name in adapters_of(url)} == holders


def test_answers_are_streamed(client: openai.OpenAI) -> None:
    for name in (BASE, *ADAPTERS):
        assert ask(client, name, streamed=True).text == chat(client, name)


def test_what_is_wrong_is_refused(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(client, "nobody")
    with pytest.raises(openai.APIStatusError) as refusal:
        chat(client, "../adapters")
    assert 400 <= refusal.value.status_code < 500
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    before = [adapters_of(server) for server in servers().values()]
    for name in ADAPTERS:
        with pytest.raises(openai.AuthenticationError):
            chat(stranger, name)
    assert [adapters_of(server) for server in servers().values()] == before
    headers = {"Authorization": f"Bearer {KEY}"}
    loaded = httpx.post(f"{url}/v1/load_lora_adapter", json={}, headers=headers)
    assert (loaded.status_code, loaded.json()["error"]["type"]) == (404, "NotFoundError")
    broken = httpx.post(f"{url}/v1/completions", content=b"{", headers=headers)
    assert broken.status_code == 400


def test_a_lost_replica_loses_no_request_that_had_not_begun(client: openai.OpenAI) -> None:
    """Its server is killed; another replica comes in its place. Comes last."""
    models = (BASE, "sql", "team/chat")
    expected = {name: chat(client, name) for name in models}
    victim, *_ = before = servers()
    outcomes = while_lost(client, models, lambda: os.kill(victim, signal.SIGKILL))
    assert_only_begun_streams_were_lost(outcomes, expected)
    deadline = time.monotonic() + START_SECONDS
    while len(servers().keys() - {victim}) < len(before):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert chat(client, "sql") == expected["sql"]
