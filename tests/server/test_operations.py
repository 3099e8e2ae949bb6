"""A server as an operator runs it: two keys, two slots, a watched root, URLs, and a restart.

The server takes two adapters into its workers at a time.
"""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import pytest
from support.api_client import BASE, KEY, copy_adapter, edit_tensors, oracle
from support.operated import (
    ADMIN,
    SENDING,
    Operated,
    copy_and_load,
    remembered,
    serving_files,
    until,
)
from support.server import TINY, Server, serve

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.formats import native

HEADER = "Molehill-Generation"


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Adapters over HTTP: `allowed/mola`, `allowed/held`, `moved/allowed/mola`, `other/mola`."""
    folder = tmp_path_factory.mktemp("remote")
    adapter = formats.read(copy_adapter("mola", folder / "pickled"))
    native.write(adapter, folder / "allowed" / "mola")
    native.write(adapter, folder / "other" / "mola")
    other = formats.read(copy_adapter("rslora", folder / "other" / "pickled"))
    native.write(other, folder / "allowed" / "held")
    shutil.copytree(folder / "pickled", folder / "allowed" / "pickled")
    with serving_files(folder) as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result: Path = tmp_path_factory.mktemp("operated")
    (result / "root").mkdir()
    for case in ("lora", "mola", "mixlora", "dynmole-soft", "loramoe"):
        copy_adapter(case, result / "root" / "group" / case)
    return result


def start(model: Path, folder: Path, remote: str, log: str) -> Any:
    arguments = [
        *(*TINY, "--max-model-len", "2048", "--served-model-name", BASE),
        *("--api-key", KEY, "--admin-api-key", ADMIN, "--max-loras", "2"),
        *("--adapter-root", str(folder / "root"), "--watch-adapter-roots"),
        *("--adapter-store", str(folder / "store"), "--allow-url-prefix", f"{remote}/allowed"),
        *("--allow-url-prefix", f"{remote}/moved", "--max-adapters", "12"),
        *("--max-adapter-loads", "2", "--max-request-mixes", "2"),
    ]
    return serve(model, folder / log, arguments, warm=True)


@pytest.fixture(scope="module")
def running(model: Path, folder: Path, remote: str) -> Iterator[Server]:
    with start(model, folder, remote, "log") as server:
        yield server


@pytest.fixture(scope="module")
def shared(running: Server, folder: Path) -> Operated:
    return Operated(running.url, folder / "root", folder / "store")


@pytest.fixture
def api(shared: Operated) -> Iterator[Operated]:
    """Adapters that the test loads are unloaded afterwards."""
    before = set(shared.listed())
    yield shared
    # Mixes by request go with their parts.
    for name in set(shared.listed()) - before - {"(mix)"}:
        assert shared.http.delete(f"/v1/adapters/{name}").status_code == 200


def test_only_the_admin_key_changes_adapters(api: Operated) -> None:
    body = {"name": "a", "source": "group/lora"}
    answer = api.asking.post("/v1/adapters", json=body)
    assert api.error(answer)[:2] == (403, "admin_key_required")
    assert httpx.post(f"{api.url}/v1/adapters", json=body).status_code == 401
    assert api.post("a", "group/lora").status_code == 200
    assert api.asking.get("/v1/adapters/a").json()["state"] == "serving"
    assert api.asking.delete("/v1/adapters/a").status_code == 403
    assert httpx.post(f"{api.url}/pause").status_code == 401
    assert api.right("a", "lora")


def test_who_may_ask_may_mix_within_the_bound(api: Operated) -> None:
    """Twelve requests at once for six mixes, of which two are kept, in two slots."""
    assert api.post("a", "group/lora").status_code == 200

    def ask(n: int) -> tuple[int, str, str]:
        answer = api.mixed({"a": n + 0.5})
        generation = answer.headers["molehill-generation"]
        return answer.status_code, answer.json()["choices"][0]["text"], generation

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, [*range(6), *range(6)]))
    assert {status for status, *_ in answers} == {200}
    # Equal mixes answer alike, also those that were made twice.
    assert answers[:6] == answers[6:]
    assert len({generation for *_, generation in answers}) == 6
    data = api.http.get("/v1/adapters").json()["data"]
    assert sum(info["name"] == "(mix)" for info in data) == 2
    named = {"name": "ab", "mix": {"a": 0.5}}
    assert api.error(api.asking.post("/v1/adapters", json=named))[:2] == (403, "admin_key_required")
    answer = api.http.post("/v1/adapters", json=named)
    assert (answer.status_code, answer.json()["generation"]) == (200, answers[0][2])


def test_a_load_says_all_that_a_deployer_needs(api: Operated) -> None:
    answer = api.post("team/a", "group/mixlora", pinned=True)
    result = answer.json()
    assert answer.headers[HEADER] == result["generation"]
    assert result["status"] == "loaded"
    assert {name: result[name] for name in ("state", "kind", "resident", "pinned", "loads")} == {
        "state": "serving",
        "kind": "mixlora",
        "resident": "workers",
        "pinned": True,
        "loads": 1,
    }
    assert result["plan"] == {"sites": 4, "static": 0, "dynamic": 4}
    assert result["source"] == "group/mixlora"
    assert api.right("team/a", "mixlora")
    shown = api.info("team/a")
    assert shown["last_used"] >= shown["created"]
    assert shown["requests_in_flight"] == 0
    unpinned = api.http.post("/v1/adapters/team/a/pin", json={"pinned": False})
    assert unpinned.json()["pinned"] is False


def test_every_answer_names_its_generation(api: Operated) -> None:
    generation = api.post("a", "group/lora").json()["generation"]
    body = {"model": "a", "prompt": [5, 6], "max_tokens": 2}
    chat = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, request in (("completions", body), ("chat/completions", chat)):
        for stream in (False, True):
            answer = api.asking.post(f"/v1/{path}", json={**request, "stream": stream})
            assert answer.status_code == 200
            assert answer.headers[HEADER] == generation
    on_base = api.asking.post("/v1/completions", json={**body, "model": BASE})
    assert on_base.status_code == 200
    assert HEADER not in on_base.headers


def test_a_swap_is_compared_first(api: Operated) -> None:
    first = api.post("a", "group/lora", expected_generation=None).json()["generation"]
    assert api.error(api.post("a", "group/mola", expected_generation=None))[:2] == (
        409,
        "generation_mismatch",
    )
    wrong = "0" * 64
    assert api.post("a", "group/mola", expected_generation=wrong).status_code == 409
    assert api.right("a", "lora")
    swapped = api.post("a", "group/mola", expected_generation=first).json()
    assert swapped["status"] == "replaced"
    assert api.right("a", "mola")
    again = api.post("a", "group/mola", expected_generation=swapped["generation"]).json()
    assert again["status"] == "unchanged"
    assert api.http.delete(f"/v1/adapters/a?expected_generation={first}").status_code == 409


def test_a_misspelt_field_is_refused(api: Operated) -> None:
    for more in ({"pined": True}, {"pinned": "yes"}, {"expected_generation": 5}):
        assert api.error(api.post("a", "group/lora", **more))[0] == 400
    answer = api.http.post("/v1/adapters/a/pin", json={"pined": True})
    assert api.error(answer)[0] == 400
    assert "a" not in api.listed()


def test_more_adapters_than_slots_all_give_their_own_answers(api: Operated) -> None:
    cases = ("lora", "mola", "mixlora", "dynmole-soft", "loramoe")
    for case in cases:
        assert api.post(case, f"group/{case}").status_code == 200
    resident = [name for name, info in api.listed().items() if info["resident"] == "workers"]
    assert resident == ["dynmole-soft", "loramoe"]
    jobs = [
        (case, prompt["prompt_token_ids"], prompt["greedy_token_ids"])
        for case in cases * 3
        for prompt in oracle(case)["prompts"]
    ]
    with ThreadPoolExecutor(15) as pool:
        result = list(pool.map(lambda job: api.greedy(job[0], job[1]), jobs))
    assert result == [expected for _, _, expected in jobs]


def test_figures_survive_that_an_adapter_is_taken_out(api: Operated) -> None:
    prompt = oracle("mola")["prompts"][1]["prompt_token_ids"]
    assert api.post("a", "group/mola").status_code == 200
    before = api.of_adapter("a", "adapter_tokens_total")
    here = api.http.get("/v1/adapters/a/routing").json()
    api.greedy("a", prompt, 1)
    for case in ("lora", "mixlora"):
        assert api.post(case, f"group/{case}").status_code == 200
    assert api.info("a")["resident"] == "host"
    samples = api.metrics()
    assert samples['molehill_adapter_resident_bytes{adapter="a",tier="worker"}'] == 0
    for tier in ("host", "disk"):
        assert samples[f'molehill_adapter_resident_bytes{{adapter="a",tier="{tier}"}}'] > 0
    assert api.of_adapter("a", "adapter_tokens_total") == before + len(prompt)
    away = api.http.get("/v1/adapters/a/routing").json()
    assert away["tokens"] == here["tokens"] + len(prompt)
    api.greedy("a", prompt[:-1], 1)
    assert api.info("a")["resident"] == "workers"
    assert api.of_adapter("a", "adapter_tokens_total") > before + len(prompt)
    back = api.http.get("/v1/adapters/a/routing").json()
    assert back["total"]["decisions"] > away["total"]["decisions"]
    later = api.metrics()
    assert later['molehill_adapter_resident_bytes{adapter="a",tier="host"}'] == 0
    hits = 'molehill_adapter_cache_hits_total{adapter="a",tier="host"}'
    assert later[hits] == samples[hits] + 1
    # The one that was used longest ago made room.
    evictions = 'molehill_adapter_evictions_total{adapter="lora",tier="worker"}'
    assert later[evictions] == samples[evictions] + 1


def test_an_adapter_comes_back_as_it_was_checked_whatever_became_of_its_files(
    api: Operated,
) -> None:
    source = copy_adapter("mola", api.root / "group" / "swapped")
    assert api.post("a", "group/swapped").status_code == 200
    shutil.rmtree(source)
    copy_adapter("lora", source)
    for case in ("dynmole-soft", "mixlora"):
        assert api.post(case, f"group/{case}").status_code == 200
    assert api.info("a")["resident"] == "host"
    assert api.right("a", "mola")
    assert api.info("a")["loads"] == 2


def test_a_cold_adapter_is_not_starved_by_hot_ones(api: Operated) -> None:
    """Both slots are busy without a pause. While the slowest of the cold requests is answered, and
    the slowest of the hot ones, every other client gets some ten answers at most."""
    for case in ("lora", "mola", "mixlora"):
        assert api.post(case, f"group/{case}").status_code == 200
    prompt = oracle("lora")["prompts"][0]["prompt_token_ids"]
    done = threading.Event()
    answered = itertools.count()

    def passed_by(ask: Callable[[], Any]) -> int:
        """Answers that others got while this one was on its way."""
        before = next(answered)
        ask()
        return next(answered) - before - 1

    def busy(case: str) -> list[int]:
        passed = []
        while not done.is_set():
            passed.append(passed_by(lambda: api.greedy(case, prompt, 40)))
        return passed

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(busy, ("lora", "mola")[i % 2]) for i in range(8)]
        try:
            cold: list[int] = []
            rights: list[bool] = []
            for _ in range(12):
                cold.append(passed_by(lambda: rights.append(api.right("mixlora", "mixlora"))))
        finally:
            done.set()
        hot = [passed for client in clients for passed in client.result()]
    assert all(rights)
    # Every answer counts twice: it is asked for, and it is here.
    for passed in (cold, hot):
        assert quantiles(passed, n=100, method="inclusive")[98] < 2 * 10 * len(clients)
    assert api.info("mixlora")["loads"] > 1


def test_a_url_below_the_prefix_is_fetched(api: Operated, remote: str) -> None:
    loaded = api.post("a", f"{remote}/allowed/mola")
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["source"] == f"{remote}/allowed/mola"
    assert api.right("a", "mola")
    assert api.post("b", "group/mola").json()["generation"] == loaded.json()["generation"]


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("other/mola", 403, "source_forbidden"),
        ("allowed/../other/mola", 403, "source_forbidden"),
        ("allowed/%2e%2e/other/mola", 403, "source_forbidden"),
        ("allowedx/mola", 403, "source_forbidden"),
        ("allowed/mola?x=1", 403, "source_forbidden"),
        ("allowed/nothing", 404, "adapter_not_found"),
        ("allowed/pickled", 404, "adapter_not_found"),
    ],
)
def test_other_urls_are_refused(
    api: Operated, remote: str, path: str, status: int, kind: str
) -> None:
    assert api.error(api.post("a", f"{remote}/{path}"))[:2] == (status, kind)
    assert "a" not in api.listed()


def test_redirects_are_not_followed(api: Operated, remote: str) -> None:
    answer = api.post("a", f"{remote}/moved/allowed/mola")
    assert api.error(answer)[:2] == (502, "fetch_failed")
    assert "a" not in api.listed()


@pytest.mark.parametrize(
    "source", ["hf://org/name", "file:///etc", "http://user@host/x", "memory://x", "ftp://x/y"]
)
def test_sources_that_nobody_allowed_are_forbidden(api: Operated, source: str) -> None:
    assert api.error(api.post("a", source))[:2] == (403, "source_forbidden")


def test_an_adapter_without_effect_is_refused_unless_that_is_wanted(api: Operated) -> None:
    """Its B is not zero, so that the file says nothing; but 1e-30 disappears in every sum."""
    source = copy_adapter("mola", api.root / "group" / "faint")

    def faint(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = tensors[name].float().sign() * 1e-30

    edit_tensors(source, faint)
    status, kind, message = api.error(api.post("a", "group/faint"))
    assert (status, kind) == (422, "no_effect")
    assert "allow_noop" in message
    assert "a" not in api.listed()
    assert api.post("a", "group/faint", allow_noop=True).status_code == 200


def test_a_watched_directory_is_served_once_it_is_finished(api: Operated) -> None:
    source = api.root / "group" / "lora"
    target = api.root / "watched"
    target.mkdir()
    weights = (source / "adapter_model.bin").read_bytes()
    (target / "adapter_model.bin").write_bytes(weights[: len(weights) // 2])
    shutil.copy(source / "adapter_config.json", target)
    # Half of a file that lies still is found out by its reader.
    assert until(lambda: api.info("watched").get("state") == "failed")
    assert "adapter_model.bin" in api.info("watched")["error"]
    assert "watched" not in api.models()
    (target / "adapter_model.bin").write_bytes(weights)
    assert until(lambda: api.info("watched")["state"] == "serving")
    assert api.right("watched", "lora")
    first = api.info("watched")["generation"]
    shutil.rmtree(target)
    copy_adapter("mixlora", target)
    assert until(lambda: api.info("watched")["generation"] != first)
    assert api.right("watched", "mixlora")
    shutil.rmtree(target)


def test_loads_over_the_limit_are_told_when_to_come_back(api: Operated) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: api.post(f"n{n}", "group/mixlora"), range(6)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) <= 4
    for answer in refused:
        assert api.error(answer)[:2] == (429, "too_many_loads")
        assert int(answer.headers["Retry-After"]) > 0
    served = {name for name, info in api.listed().items() if info["state"] == "serving"}
    assert len(served & {f"n{n}" for n in range(6)}) == 6 - len(refused)


def test_more_names_than_allowed_are_refused(api: Operated) -> None:
    free = 12 - len(api.models()) + 1
    for n in range(free):
        assert api.post(f"n{n}", "group/lora").status_code == 200
    status, kind, _ = api.error(api.post("one-more", "group/lora"))
    assert (status, kind) == (507, "too_many_adapters")


def test_a_killed_server_serves_again_what_it_served(
    shared: Operated, running: Server, model: Path, folder: Path, remote: str
) -> None:
    for name in set(shared.models()) - {BASE}:
        shared.unload(name)
    served = {
        "kept": shared.post("kept", "group/mixlora", pinned=True).json()["generation"],
        "changed": copy_and_load(shared, "changed", "mola"),
        "lost": copy_and_load(shared, "lost", "loramoe"),
        "gone": copy_and_load(shared, "gone", "lora"),
        "held": shared.post("held", f"{remote}/allowed/held").json()["generation"],
        "unwanted": copy_and_load(shared, "unwanted", "dynmole-soft"),
    }
    running.process.kill()
    running.process.wait(60)
    # The source of one has other content now, that of another too and its copy is lost as well.
    for name, other in (("changed", "lora"), ("lost", "lora")):
        shutil.rmtree(folder / "root" / "group" / f"of-{name}")
        copy_adapter(other, folder / "root" / "group" / f"of-{name}")
    for name in ("lost", "held"):
        shutil.rmtree(folder / "store" / served[name])
    shutil.rmtree(folder / "root" / "group" / "of-gone")
    (folder / "store" / ("0" * 64)).mkdir()
    SENDING.clear()
    with start(model, folder, remote, "log2") as server:
        api = Operated(server.url, folder / "root", folder / "store")
        assert until(lambda: api.info("held").get("stage") == "fetching")
        not_yet = httpx.get(f"{server.url}/health/ready")
        assert (not_yet.status_code, int(not_yet.headers["Retry-After"])) == (503, 1)
        assert httpx.get(f"{server.url}/health").status_code == 200
        # One comes after the other; a client may do without it meanwhile.
        assert (api.info("changed")["state"], api.info("unwanted")["state"]) == (
            "serving",
            "loading",
        )
        assert api.http.delete("/v1/adapters/unwanted").status_code == 200
        served.pop("unwanted")
        SENDING.set()
        assert until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        assert "unwanted" not in api.listed()
        assert api.right("held", "rslora")
        for name in ("kept", "changed", "gone"):
            assert api.info(name)["generation"] == served[name]
        assert api.right("kept", "mixlora")
        assert api.right("changed", "mola")
        assert api.right("gone", "lora")
        assert [api.info(name)["pinned"] for name in ("kept", "changed")] == [True, False]
        assert until(lambda: api.info("changed")["source_note"] is not None)
        assert "other content" in api.info("changed")["source_note"]
        assert until(lambda: "cannot be read" in (api.info("gone")["source_note"] or ""))
        assert api.info("kept")["source_note"] is None
        lost = api.info("lost")
        assert (lost["state"], lost["generation"]) == ("failed", None)
        assert "of-lost" in lost["error"]
        assert lost["error_type"] == "source_changed"
        assert api.metrics()['molehill_adapters{state="failed"}'] == 1
        assert "lost" not in api.models()
        assert not (folder / "store" / ("0" * 64)).exists()
        assert remembered(folder) == set(served)
        assert api.http.delete("/v1/adapters/lost").status_code == 200
        assert "lost" not in api.listed()
    # Stopped in order, it leaves the next one what it needs.
    assert remembered(folder) == set(served) - {"lost"}
    for name in remembered(folder):
        assert native.read(folder / "store" / served[name], Limits()).digest == served[name]
