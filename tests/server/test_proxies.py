"""LiteLLM's proxy and vLLM's router, as they are installed, in front of two servers.

Each request names the base or an adapter; one server is killed while they come.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from support.api_client import BASE, KEY, Api, eventually, oracle
from support.proxies import PROXIES, Proxy, program, running
from support.server import TINY, Server, serve

pytestmark = pytest.mark.skipif(
    os.environ.get("MOLEHILL_LONG_TESTS") != "1",
    reason="three servers and a proxy each; MOLEHILL_LONG_TESTS=1 runs it",
)

# By what clients ask for. Both servers follow one file.
ADAPTERS = {"sql": "lora", "team/chat:v2": "dynmole-soft"}
MODELS = (BASE, *ADAPTERS)
MESSAGES: Any = [{"role": "user", "content": "The lamp and the map"}]
CLIENTS, BEFORE, AFTER = 6, 30, 60


@dataclass(frozen=True)
class Outcome:
    """Of one request. begun: whether a part of its answer came. after: asked after the kill."""

    model: str
    streamed: bool
    after: bool
    begun: bool
    text: str | None


@pytest.fixture(scope="module")
def servers(
    model: Path, adapter_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """One that stays, and one for each proxy to lose."""
    folder = tmp_path_factory.mktemp("fleet")
    file = folder / "adapters.yaml"
    entries = [{"name": name, "source": case} for name, case in ADAPTERS.items()]
    file.write_text(yaml.safe_dump(entries))
    arguments = [
        *(*TINY, "--served-model-name", BASE, "--api-key", KEY),
        *("--adapter-root", str(adapter_root), "--adapters-file", str(file)),
    ]
    with ExitStack() as stack:
        result = [
            stack.enter_context(serve(model, folder / f"log-{number}", arguments, warm=True))
            for number in range(1 + len(PROXIES))
        ]
        assert all(eventually(lambda s=s: is_ready(s)) for s in result)
        yield result


def is_ready(server: Server) -> bool:
    return httpx.get(f"{server.url}/health/ready").status_code == 200


@pytest.fixture(scope="module")
def expected(servers: list[Server], adapter_root: Path) -> dict[str, str]:
    """What each model says to MESSAGES, by the server itself; and of a prompt, what the oracle
    does."""
    api = Api(servers[0].url, adapter_root, adapter_root)
    for name in MODELS:
        prompt = oracle(ADAPTERS.get(name, "base"))["prompts"][0]
        assert api.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    answers = {name: chat(api.openai, name) for name in MODELS}
    assert len(set(answers.values())) == len(MODELS)
    return answers


def chat(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def client_of(proxy: Proxy, url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=proxy.key, max_retries=0, timeout=60)


def ask(client: openai.OpenAI, model: str, streamed: bool, killed: threading.Event) -> Outcome:
    after, begun = killed.is_set(), False
    try:
        if not streamed:
            return Outcome(model, streamed, after, True, chat(client, model))
        parts, ended = [], False
        with client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0, stream=True
        ) as stream:
            for chunk in stream:
                begun = True
                parts += [choice.delta.content or "" for choice in chunk.choices]
                ended = any(choice.finish_reason for choice in chunk.choices)
        return Outcome(model, streamed, after, True, "".join(parts) if ended else None)
    except (openai.APIError, httpx.TransportError):
        return Outcome(model, streamed, after, begun, None)


def requests_of(server: Server) -> float:
    """Completed by it so far."""
    lines = server.get("/metrics").splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:request_success_total")
    )


def under_fire(client: openai.OpenAI, victim: Server) -> list[Outcome]:
    """Requests of CLIENTS clients, during which the victim is killed, all its processes at once."""
    numbers, killed = itertools.count(), threading.Event()
    lock = threading.Lock()

    def work() -> list[Outcome]:
        outcomes = []
        while (number := next(numbers)) < BEFORE + AFTER:
            with lock:
                if number >= BEFORE and not killed.is_set():
                    os.killpg(victim.process.pid, signal.SIGKILL)
                    killed.set()
            outcomes.append(ask(client, MODELS[number % 3], number % 2 == 0, killed))
        return outcomes

    with ThreadPoolExecutor(CLIENTS) as pool:
        workers = [pool.submit(work) for _ in range(CLIENTS)]
        return [outcome for worker in workers for outcome in worker.result()]


@pytest.mark.parametrize("name", PROXIES)
def test_no_request_that_had_not_begun_is_lost_with_a_server(
    name: str, servers: Sequence[Server], expected: dict[str, str], tmp_path: Path
) -> None:
    proxy = PROXIES[name]
    program(proxy.program)
    staying, victim = servers[0], servers[1 + list(PROXIES).index(name)]
    with running(proxy, [staying.url, victim.url], tmp_path / "log") as url:
        client = client_of(proxy, url)
        counts = [requests_of(server) for server in (staying, victim)]
        for _, model, streamed in itertools.product(range(3), MODELS, (False, True)):
            outcome = ask(client, model, streamed, threading.Event())
            assert outcome.text == expected[model], outcome
        answered = [requests_of(server) for server in (staying, victim)]
        assert all(now > before for now, before in zip(answered, counts, strict=True))
        with pytest.raises(openai.APIStatusError) as refusal:
            chat(client, "nobody")
        assert 400 <= refusal.value.status_code < 500
        outcomes = under_fire(client, victim)
    assert len(outcomes) == BEFORE + AFTER
    assert sum(outcome.after for outcome in outcomes) > AFTER / 2
    log = (tmp_path / "log").read_text(errors="replace")[-3000:]
    for outcome in outcomes:
        assert outcome.text == expected[outcome.model] or (
            outcome.text is None and outcome.begun and not outcome.after
        ), f"{outcome}\n{log}"
    assert staying.process.poll() is None
