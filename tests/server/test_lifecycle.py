"""Loading, replacing and unloading over HTTP, under traffic."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import pytest
from support.api_client import BASE, Api, Running, eventually, oracle

# Enough for a request to run on for seconds while a test does something else.
MANY_TOKENS = 400
MANY_PROMPTS = 64


def test_a_load_answers_with_what_serves(clean: Api) -> None:
    answer = clean.load("m", "mixlora").json()
    assert answer["status"] == "loaded"
    assert answer["lora_name"] == "m"
    assert answer["kind"] == "mixlora"
    assert len(answer["digest"]) == 64
    # 4 layers x 4 experts x rank 2: gate and up 64 -> 176, down back; and a router [4, 64].
    assert answer["bytes"] == 4 * 4 * (4 * 2 * 3 * (64 + 176) + 4 * 64)


def test_the_same_bytes_again_change_nothing(clean: Api) -> None:
    first = clean.load("m", "lora").json()
    again = clean.load("m", "lora", load_inplace=True).json()
    assert again == {**first, "status": "unchanged"}
    assert clean.load("m", "lora").json()["status"] == "unchanged"


def test_other_bytes_under_a_loaded_name_need_load_inplace(clean: Api) -> None:
    assert clean.load("m", "lora").status_code == 200
    status, kind, message = clean.error(clean.load("m", "mixlora"))
    assert (status, kind) == (400, "already_loaded")
    assert "load_inplace" in message
    prompt = oracle("lora")["prompts"][0]
    assert clean.greedy("m", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def test_a_reload_never_meets_the_old_prefix_cache(clean: Api) -> None:
    old, new = (oracle(case)["prompts"][3] for case in ("lora", "mixlora"))
    assert old["prompt_token_ids"] == new["prompt_token_ids"]
    prompt = old["prompt_token_ids"]

    def ask() -> tuple[list[int], int]:
        """The adapter's answer, in one batch with the base's to the same prompt."""
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(clean.greedy, BASE, prompt)
            response = clean.complete("m", prompt)
        assert beside.result() == old["base_greedy_token_ids"]
        details = response.usage.prompt_tokens_details
        return response.choices[0].token_ids, details.cached_tokens if details else 0

    assert clean.load("m", "lora").status_code == 200
    assert ask() == (old["greedy_token_ids"], 0)
    assert ask() == (old["greedy_token_ids"], 32)
    assert clean.load("m", "mixlora", load_inplace=True).json()["status"] == "replaced"
    assert ask() == (new["greedy_token_ids"], 0)
    assert ask() == (new["greedy_token_ids"], 32)
    assert clean.load("m", "lora", load_inplace=True).json()["status"] == "replaced"
    assert ask() == (old["greedy_token_ids"], 32)


PROMPT = oracle("mola")["prompts"][1]["prompt_token_ids"]


@pytest.fixture(scope="module")
def quiet(api: Api) -> list[int]:
    """What MoLA answers to PROMPT when nothing else goes on."""
    assert api.load("quiet", "mola").status_code == 200
    tokens = api.greedy("quiet", PROMPT, MANY_TOKENS)
    assert api.unload("quiet").status_code == 200
    return tokens


def test_loads_and_unloads_do_not_change_a_running_request(clean: Api, quiet: list[int]) -> None:
    assert clean.load("m", "mola").status_code == 200
    running = Running(clean, "m", PROMPT, MANY_TOKENS)
    assert clean.unload("m").json()["requests_in_flight"] == 1
    for case in ("mixlora", "dynmole-soft", "lora"):
        assert clean.load(case, case).status_code == 200
        expected = oracle(case)["prompts"][0]
        assert clean.greedy(case, expected["prompt_token_ids"]) == expected["greedy_token_ids"]
        assert clean.unload(case).status_code == 200
    assert running.rest() == quiet


def test_unloading_lets_running_requests_finish_and_then_frees_the_memory(
    clean: Api, quiet: list[int]
) -> None:
    assert clean.load("m", "mola").status_code == 200
    running = Running(clean, "m", PROMPT, MANY_TOKENS)
    assert clean.unload("m").json()["requests_in_flight"] == 1
    assert "m" not in clean.models()
    with pytest.raises(openai.NotFoundError):
        clean.greedy("m", PROMPT)
    assert running.rest() == quiet
    assert eventually(lambda: not any('"m"' in sample for sample in clean.metrics()))


def test_replacing_lets_running_requests_finish_on_the_old_weights(
    clean: Api, quiet: list[int]
) -> None:
    new = oracle("lora")["prompts"][1]
    assert new["prompt_token_ids"] == PROMPT

    assert clean.load("m", "mola").status_code == 200
    running = Running(clean, "m", PROMPT, MANY_TOKENS)
    assert clean.of_adapter("m", "adapter_requests_in_flight") == 1
    assert clean.load("m", "lora", load_inplace=True).json()["status"] == "replaced"
    assert clean.greedy("m", PROMPT) == new["greedy_token_ids"]
    assert running.rest() == quiet
    assert clean.greedy("m", PROMPT) == new["greedy_token_ids"]


def test_a_beam_search_keeps_its_weights_to_its_end(clean: Api) -> None:
    """Every token of it is a request of its own to the engine."""

    def beams() -> list[str]:
        answer = clean.openai.completions.create(
            model="m",
            prompt=PROMPT,
            max_tokens=120,
            n=2,
            temperature=0,
            extra_body={"use_beam_search": True, "ignore_eos": True},
        )
        return [choice.text for choice in answer.choices]

    assert clean.load("m", "mola").status_code == 200
    expected = beams()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(beams)
        assert eventually(
            lambda: clean.of_adapter("m", "adapter_requests_in_flight") or asking.done()
        )
        assert clean.load("m", "lora", load_inplace=True).json()["status"] == "replaced"
        assert clean.unload("m").status_code == 200
        assert not asking.done()
        assert asking.result() == expected
    assert eventually(lambda: not any('"m"' in sample for sample in clean.metrics()))


def test_a_client_that_goes_away_is_no_longer_in_flight(clean: Api) -> None:
    """Prompts enough to be running for certain; that they were given up shows in the tokens."""
    assert clean.load("m", "lora").status_code == 200
    stream = clean.complete("m", [PROMPT] * MANY_PROMPTS, MANY_TOKENS, stream=True)
    with closing(stream):
        next(iter(stream))
        assert clean.of_adapter("m", "adapter_requests_in_flight") == 1
    assert eventually(lambda: clean.of_adapter("m", "adapter_requests_in_flight") == 0)
    asked = MANY_PROMPTS * MANY_TOKENS
    assert clean.of_adapter("m", "adapter_tokens_total") < asked / 2


def test_unloading_an_unknown_name_is_not_found(api: Api) -> None:
    assert api.error(api.unload("nobody"))[:2] == (404, "adapter_not_loaded")
    assert api.error(api.unload(BASE))[:2] == (404, "adapter_not_loaded")


def test_an_unloaded_name_can_be_loaded_again(clean: Api) -> None:
    for case in ("lora", "mixlora"):
        assert clean.load("m", case).status_code == 200
        prompt = oracle(case)["prompts"][2]
        assert clean.greedy("m", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
        assert clean.unload("m").status_code == 200


def test_the_store_holds_what_is_loaded_and_nothing_else(clean: Api) -> None:
    before = {path.name for path in clean.store.iterdir()}
    first = clean.load("m", "lora").json()["digest"]
    assert clean.load("n", "lora").json()["digest"] == first
    assert {path.name for path in clean.store.iterdir()} == before | {first}
    assert clean.unload("m").status_code == 200
    assert {path.name for path in clean.store.iterdir()} == before | {first}
    assert clean.unload("n").status_code == 200
    assert {path.name for path in clean.store.iterdir()} == before


def test_several_samples_of_one_request_do_not_keep_an_unloaded_adapter(clean: Api) -> None:
    assert clean.load("m", "lora").status_code == 200
    response = clean.openai.completions.create(
        model="m",
        prompt=PROMPT,
        max_tokens=20,
        n=3,
        extra_body={"top_k": 1, "ignore_eos": True},
    )
    assert len(response.choices) == 3
    assert clean.unload("m").json()["requests_in_flight"] == 0
    assert eventually(lambda: not any('"m"' in sample for sample in clean.metrics()))
    assert clean.load("m", "mixlora").json()["status"] == "loaded"


def test_many_cycles_leave_nothing_behind(clean: Api) -> None:
    before = clean.metrics()["molehill_adapters_loaded"], sorted(clean.store.iterdir())
    sizes = set()
    for _ in range(20):
        assert clean.load("m", "mixlora").status_code == 200
        sizes.add(clean.metrics()['molehill_adapter_resident_bytes{adapter="m",tier="worker"}'])
        assert clean.unload("m").status_code == 200
    assert len(sizes) == 1
    assert before == (clean.metrics()["molehill_adapters_loaded"], sorted(clean.store.iterdir()))


def test_under_churn_every_answer_is_an_adapters_or_not_found(clean: Api) -> None:
    prompts = {case: oracle(case)["prompts"][0] for case in ("lora", "mixlora")}
    allowed = [prompt["greedy_token_ids"] for prompt in prompts.values()]
    ids = prompts["lora"]["prompt_token_ids"]
    done = threading.Event()

    answers: list[list[int] | None] = []

    def ask() -> None:
        while not done.is_set():
            try:
                answers.append(clean.greedy("m", ids))
            except openai.NotFoundError:
                answers.append(None)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for number in range(10):
                assert clean.load("m", "lora").status_code == 200
                # However slow the machine is, each is asked for once.
                assert number or eventually(lambda: allowed[0] in answers)
                time.sleep(0.05)
                assert clean.load("m", "mixlora", load_inplace=True).status_code == 200
                assert number or eventually(lambda: allowed[1] in answers)
                time.sleep(0.05)
                assert clean.unload("m").status_code == 200
        finally:
            done.set()
        for future in asking:
            future.result()
    served = [answer for answer in answers if answer is not None]
    assert None in answers
    assert all(expected in served for expected in allowed)
    assert all(answer in allowed for answer in served)
