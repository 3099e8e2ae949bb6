"""LiteLLM's proxy and vLLM's router, as they are installed, in front of two servers.

Each request names the base or an adapter; one server is killed while they come.
"""

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from support.api_client import BASE, KEY, Api, eventually, oracle
from support.outcomes import ask, assert_only_begun_streams_were_lost, chat, while_lost
from support.proxies import PROXIES, Proxy, needs, running
from support.server import TINY, Server, serve

pytestmark = pytest.mark.skipif(
    os.environ.get("MOLEHILL_LONG_TESTS") != "1",
    reason="three servers and a proxy each; MOLEHILL_LONG_TESTS=1 runs it",
)

# By what clients ask for. Both servers follow one file.
ADAPTERS = {"sql": "lora", "team/chat:v2": "dynmole-soft"}
MODELS = (BASE, *ADAPTERS)


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


def client_of(proxy: Proxy, url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=proxy.key, max_retries=0, timeout=60)


def requests_of(server: Server) -> float:
    """Completed by it so far."""
    lines = server.get("/metrics").splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:request_success_total")
    )


def is_unknown(client: openai.OpenAI, model: str) -> bool:
    try:
        chat(client, model)
    except openai.NotFoundError:
        return True
    except openai.APIError:
        return False
    raise AssertionError(f"{model} answered")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(proxy.program)) for name, proxy in PROXIES.items()]
)
def test_no_request_that_had_not_begun_is_lost_with_a_server(
    name: str, servers: Sequence[Server], expected: dict[str, str], tmp_path: Path
) -> None:
    proxy = PROXIES[name]
    staying, victim = servers[0], servers[1 + list(PROXIES).index(name)]
    with running(proxy, [staying.url, victim.url], tmp_path / "log") as url:
        client = client_of(proxy, url)
        counts = [requests_of(server) for server in (staying, victim)]
        for _, model, streamed in itertools.product(range(3), MODELS, (False, True)):
            outcome = ask(client, model, streamed)
            assert outcome.text == expected[model], outcome
        answered = [requests_of(server) for server in (staying, victim)]
        assert all(now > before for now, before in zip(answered, counts, strict=True))
        # No matter how often, it takes no server out.
        assert all(is_unknown(client, "nobody") for _ in range(8))
        lose = lambda: os.killpg(victim.process.pid, signal.SIGKILL)  # noqa: E731
        assert_only_begun_streams_were_lost(while_lost(client, MODELS, lose), expected)
        # Soon the lost one is not asked any more, whose silence would be another error.
        assert eventually(lambda: all(is_unknown(client, "nobody") for _ in range(8)))
    assert staying.process.poll() is None
