"""A server that serves X-LoRA: how it comes, keeps scalings, is replaced, and is given up midway.

The server takes two adapters into its workers at a time.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import xlora
from support.api_client import BASE, KEY, Api, Running, copy_adapter, oracle
from support.golden import Case
from support.operated import serving_files
from support.server import TINY, serve
from support.uploads import files_of, upload


class Client(Api):
    """Loads by molehill's route."""

    def post(self, name: str, source: str, **more: Any) -> Any:
        return self.http.post("/v1/adapters", json={"name": name, "source": source, **more})

    def info(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.http.get(f"/v1/adapters/{name}").json()
        return result

    def right(self, name: str, case: str) -> bool:
        """Whether the name answers as the case's oracle does."""
        prompt = oracle(case)["prompts"][0]
        return self.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


PROMPT = [303, 316, 288, 262, 352, 17, 40, 41, 42]
LONG = 24


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("remote")
    shutil.copytree(Case("xlora").path, folder / "allowed" / "xlora")
    with serving_files(folder) as url:
        yield url


@pytest.fixture(scope="module")
def shared(model: Path, remote: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("x-lora")
    for case in ("lora", "xlora"):
        copy_adapter(case, folder / "root" / case)
    arguments = [
        *(*TINY, "--max-model-len", "2048", "--served-model-name", BASE, "--api-key", KEY),
        *("--adapter-root", str(folder / "root"), "--adapter-store", str(folder / "store")),
        *("--allow-url-prefix", f"{remote}/allowed", "--max-loras", "2", "--xlora"),
    ]
    with serve(model, folder / "log", arguments, warm=True) as server:
        yield Client(server.url, folder / "root", folder / "store")
        assert server.process.poll() is None, server.tail()


@pytest.fixture
def api(shared: Client) -> Iterator[Client]:
    yield shared
    for name in set(shared.models()) - {BASE}:
        assert shared.unload(name).status_code == 200


@pytest.fixture(scope="module")
def x_lora_answers() -> dict[int, list[int]]:
    """Of the golden X-LoRA by the definition, by how many tokens have scalings of their own."""
    return {tokens: xlora.golden_answer(PROMPT, tokens, LONG) for tokens in (0, 2, LONG)}


def test_an_x_lora_comes_by_path_url_and_form_and_keeps_scalings_where_it_is_told_to(
    api: Client, remote: str, x_lora_answers: dict[int, list[int]]
) -> None:
    """Two of four names have a slot; each answers as itself, in one batch with others."""
    assert api.post("lora", "lora").status_code == 200
    exact = api.post("exact", "xlora").json()
    assert api.post("by-url", f"{remote}/allowed/xlora").json()["generation"] == exact["generation"]
    kept = api.post("kept", "xlora", non_granular_after=2).json()
    files = files_of(Case("xlora").path)
    sent = upload(api, files, {"name": "sent", "non_granular_after": "0"}).json()
    assert len({exact["generation"], kept["generation"], sent["generation"]}) == 3
    for name, tokens in (("exact", None), ("by-url", None), ("kept", 2), ("sent", 0)):
        said = [text for text in api.info(name)["warnings"] if "non_granular_after" in text]
        assert [f"is {tokens}: later tokens" in text for text in said] == [True] * (
            tokens is not None
        )
    names = {"exact": LONG, "kept": 2, "sent": 0, "by-url": LONG}
    asked = [*names, *names]
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        of_lora = pool.submit(api.right, "lora", "lora")
        replies = list(pool.map(lambda name: api.greedy(name, PROMPT, LONG), asked))
    assert of_lora.result()
    for name, reply in zip(asked, replies, strict=True):
        assert reply == x_lora_answers[names[name]], name


@pytest.mark.parametrize("value", [-1, "2", 1.5, True, [2]])
def test_a_number_of_tokens_that_is_none_is_refused(api: Client, value: Any) -> None:
    assert api.post("x", "xlora", non_granular_after=value).status_code == 400
    assert "x" not in api.models()


def test_scalings_are_kept_of_x_loras_alone(api: Client) -> None:
    status, kind, message = api.error(api.post("x", "lora", non_granular_after=2))
    assert (status, kind) == (422, "unsupported")
    assert "non_granular_after: found 2, expected none, as scalings are X-LoRA's" in message
    assert "x" not in api.models()


def test_an_x_lora_is_replaced_and_given_up_in_the_middle_of_answers(
    api: Client, x_lora_answers: dict[int, list[int]]
) -> None:
    """By another number of tokens under its name; who began before goes on as it began."""
    first = api.post("x", "xlora", non_granular_after=2)
    assert first.json()["status"] == "loaded"
    given_up = [Running(api, "x", PROMPT, 1500) for _ in range(2)]
    before = Running(api, "x", PROMPT, LONG)
    replaced = api.post("x", "xlora", non_granular_after=0)
    assert replaced.json()["status"] == "replaced"
    after = Running(api, "x", PROMPT, LONG)
    for stream in given_up:
        stream.disconnect()
    assert api.greedy("x", PROMPT, LONG) == x_lora_answers[0]
    assert before.rest() == x_lora_answers[2]
    assert after.rest() == x_lora_answers[0]
    back = api.post("x", "xlora")
    assert back.json()["status"] == "replaced"
    assert back.json()["generation"] not in (
        first.json()["generation"],
        replaced.json()["generation"],
    )
    assert api.greedy("x", PROMPT, LONG) == x_lora_answers[LONG]
