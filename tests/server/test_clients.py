"""What clients of plain vLLM send, and expect: the OpenAI client's models, and a LoRA syncer."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.api_client import BASE, GOLDEN, Api, Running, copy_adapter, eventually, oracle
from support.golden import TINY_LLAMA, greatest_difference
from support.server import TINY, serve
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA_INFO = "vllm:lora_requests_info"
LONG = 1500


def test_a_model_is_retrieved_as_the_list_has_it(clean: Api) -> None:
    assert clean.load("team/model-x:v2", "lora").status_code == 200
    listed = {model.id: model for model in clean.openai.models.list()}
    assert set(listed) == {BASE, "started", "team/model-x:v2"}
    for name, model in listed.items():
        result = clean.openai.models.retrieve(name)
        # vLLM makes up the id of a permission, and the base model's age, anew for every answer.
        made_up = {"permission": ..., "created": ...}
        assert {**result.model_dump(), **made_up} == {**model.model_dump(), **made_up}
        assert result.object == "model"
    assert clean.openai.models.retrieve("started").created == listed["started"].created


def test_the_list_is_found_with_a_slash_too_many(api: Api) -> None:
    listed = api.http.get("/v1/models/", follow_redirects=True).json()["data"]
    assert [card["id"] for card in listed] == list(api.models())


def test_a_model_is_retrieved_with_the_key_only(api: Api) -> None:
    for name in ("started", "nobody"):
        assert httpx.get(f"{api.url}/v1/models/{name}").status_code == 401


def test_an_unloaded_adapter_is_not_retrieved(clean: Api) -> None:
    assert clean.load("m", "lora").status_code == 200
    assert clean.openai.models.retrieve("m").id == "m"
    assert clean.unload("m").status_code == 200
    with pytest.raises(openai.NotFoundError) as refusal:
        clean.openai.models.retrieve("m")
    assert refusal.value.param == "model"


def chat(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


ASKED = {
    "/v1/completions": lambda model: {"model": model, "prompt": "x"},
    "/v1/chat/completions": chat,
    "/v1/responses": lambda model: {"model": model, "input": "x"},
    "/v1/messages": chat,
    "/tokenize": lambda model: {"model": model, "prompt": "x"},
    "/detokenize": lambda model: {"model": model, "tokens": [5]},
}


def test_an_unknown_model_is_answered_with_what_is_served(clean: Api) -> None:
    expected = f"The model `nobody` does not exist. Valid aliases: {BASE}, started, team/m."
    assert clean.load("team/m", "lora").status_code == 200
    answers = {path: clean.http.post(path, json=body("nobody")) for path, body in ASKED.items()}
    answers["retrieve"] = clean.http.get("/v1/models/nobody")
    for path, answer in answers.items():
        error = answer.json()["error"]
        assert (path, answer.status_code, error["message"]) == (path, 404, expected)
        if path != "/v1/messages":
            assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


def test_of_many_models_the_first_are_named(clean: Api) -> None:
    for number in range(25):
        assert clean.load(f"n{number}", "lora").status_code == 200
    for answer in (
        clean.http.post("/v1/completions", json={"model": "nobody", "prompt": "x"}),
        clean.http.get("/v1/models/nobody"),
    ):
        names = answer.json()["error"]["message"].partition("Valid aliases: ")[2]
        shown = [BASE, "started", *(f"n{number}" for number in range(18))]
        assert names == ", ".join([*shown, "and 7 more."])


@pytest.fixture(scope="module")
def embedding(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server that embeds, of a model that is named by nothing but its directory."""
    folder = tmp_path_factory.mktemp("embedding")
    adapter = copy_adapter("lora", folder / "adapter")
    arguments = [*TINY, "--max-model-len", "128", "--runner", "pooling", "--convert", "embed"]
    arguments += ["--adapter", f"embeds={adapter}", "--enforce-eager"]
    with serve(model, folder / "log", arguments, warm=True) as server:
        yield Api(server.url, folder, folder)


def test_no_answer_names_the_directory_of_the_base_model(embedding: Api, model: Path) -> None:
    client = embedding.openai
    assert len(client.embeddings.create(model="embeds", input="x").data) == 1
    answers = [
        embedding.http.post("/v1/embeddings", json={"model": "nobody", "input": "x"}),
        embedding.http.post("/tokenize", json={"model": "nobody", "prompt": "x"}),
        embedding.http.get("/v1/models/nobody"),
    ]
    for answer in answers:
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
        aliases = f"Valid aliases: {model.name}, embeds."
        assert error["message"] == f"The model `nobody` does not exist. {aliases}"
        assert answer.status_code == 404
    # Who knows the directory goes on using it.
    assert client.embeddings.create(model=str(model), input="x").model == model.name
    assert client.models.retrieve(str(model)).id == str(model)
    assert [result.id for result in client.models.list()] == [model.name, "embeds"]


@torch.inference_mode()
def embedded(model: Any, text: str) -> Tensor:
    """The state after the last token, of length 1; model: the one below the LM head."""
    ids = AutoTokenizer.from_pretrained(TINY_LLAMA)(text, return_tensors="pt").input_ids
    state = model(ids).last_hidden_state[0, -1]
    vector: Tensor = state / state.norm()
    return vector


def test_embeddings_and_scores_are_the_adapters_beside_the_base(
    embedding: Api, model: Path
) -> None:
    """All of one batch, held against Transformers and PEFT."""
    texts = ["The lamp and the map", "one hundred and five"]
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    expected = {model.name: [embedded(base.model, text) for text in texts]}
    adapted = peft.PeftModel.from_pretrained(base, GOLDEN / "cases" / "lora").eval()
    expected["embeds"] = [embedded(adapted.get_base_model().model, text) for text in texts]
    jobs = [(name, i) for name in expected for i in range(len(texts))]

    def embed(job: tuple[str, int]) -> Tensor:
        name, i = job
        answer = embedding.openai.embeddings.create(
            model=name, input=texts[i], encoding_format="float"
        )
        return torch.tensor(answer.data[0].embedding)

    def score(name: str) -> float:
        body = {"model": name, "text_1": texts[0], "text_2": texts[1]}
        answer = embedding.http.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        value: float = answer.json()["data"][0]["score"]
        return value

    with ThreadPoolExecutor(len(jobs) + len(expected)) as pool:
        scores = {name: pool.submit(score, name) for name in expected}
        vectors = list(pool.map(embed, jobs))
    for vector, (name, i) in zip(vectors, jobs, strict=True):
        assert greatest_difference(vector, expected[name][i]) < 1e-4, name
    for name, (first, second) in expected.items():
        assert scores[name].result() == pytest.approx(float(first @ second), abs=1e-4), name
    moved = greatest_difference(expected["embeds"][0], expected[model.name][0])
    assert moved > 1e-2


class Syncer:
    """Sends what the Gateway API Inference Extension's LoRA syncer does, in its order.

    Every load and unload asks for the server's health and its models first. The shared server wants
    a key, which the syncer does not know: here it is sent along.
    """

    def __init__(self, api: Api, base_model: str) -> None:
        self._api = api
        self._base_model = base_model
        self.errors: list[str] = []

    def reconcile(self, present: dict[str, str], absent: dict[str, str]) -> None:
        """By adapter, its source."""
        assert self._api.http.get("/health").status_code == 200
        for name, source in present.items():
            if name not in self._registered():
                self._post(
                    "/v1/load_lora_adapter",
                    {
                        "lora_name": name,
                        "lora_path": source,
                        "base_model_name": self._base_model,
                    },
                )
        for name in absent:
            if name in self._registered():
                self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _registered(self) -> set[str]:
        assert self._api.http.get("/health").status_code == 200
        return {card.get("id", "") for card in self._api.http.get("/v1/models").json()["data"]}

    def _post(self, path: str, body: dict[str, str]) -> None:
        try:
            self._api.http.post(path, json=body).raise_for_status()
        except httpx.HTTPError as error:
            self.errors.append(str(error))


@pytest.mark.parametrize("base_model", [BASE, "", "org/whatever"])
def test_a_lora_syncer_reaches_what_it_wants(clean: Api, base_model: str) -> None:
    syncer = Syncer(clean, base_model)
    # Two names of the same source, a name with a slash, and an absolute path.
    wanted = {"one": "lora", "two": "lora", "team/mix": str(clean.root / "mixlora")}
    for _ in range(2):
        syncer.reconcile(wanted, {"gone": "lora"})
        assert (syncer.errors, set(clean.models())) == ([], {BASE, "started", *wanted})
    prompt = oracle("mixlora")["prompts"][0]
    assert clean.greedy("team/mix", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    syncer.reconcile({"one": "lora"}, {"two": "lora", "team/mix": "mixlora"})
    assert (syncer.errors, set(clean.models())) == ([], {BASE, "started", "one"})


def test_unknown_fields_on_vllms_routes_are_ignored_and_logged(clean: Api) -> None:
    before = log(clean)
    more = {"base_model_name": BASE, "x\nforged": 1, "y" * 500: None}
    assert clean.load("m", "lora", **more).status_code == 200
    body = {"lora_name": "m", "lora_path": "lora"}
    assert clean.http.post("/v1/unload_lora_adapter", json=body).status_code == 200
    warnings = [line for line in log(clean)[len(before) :] if "does not know" in line]
    assert len(warnings) == 2
    assert all("WARNING" in line for line in warnings)
    message = json.loads(warnings[0])["message"]
    assert "'base_model_name', 'x\\nforged', 'yyy" in message
    assert len(message) < 400
    assert "'lora_path'" in warnings[1]
    assert not any(line.startswith("forged") for line in log(clean))


def test_known_fields_are_not_logged(clean: Api) -> None:
    before = log(clean)
    assert clean.load("m", "lora", load_inplace=True, is_3d_lora_weight=False).status_code == 200
    body = {"lora_name": "m", "lora_int_id": 1}
    assert clean.http.post("/v1/unload_lora_adapter", json=body).status_code == 200
    assert not [line for line in log(clean)[len(before) :] if "does not know" in line]


def log(api: Api) -> list[str]:
    """Of the shared server."""
    return (api.store.parent / "log").read_text().splitlines()


def lora_info(api: Api) -> list[tuple[dict[str, str], float]]:
    """Labels and value of every series, as Prometheus reads them."""
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    result = [family for family in families if family.name == LORA_INFO]
    assert [family.type for family in result] == ["gauge"]
    return [(sample.labels, sample.value) for sample in result[0].samples]


def test_the_adapters_at_work_are_told_in_one_series(clean: Api) -> None:
    """As the Gateway API Inference Extension's protocol wants it."""
    for name, case in (("team/a:1", "lora"), ("b", "mola")):
        assert clean.load(name, case).status_code == 200
    labels = {"max_lora": "32", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    ((idle, first),) = lora_info(clean)
    assert idle == labels
    assert abs(first - time.time()) < 3600
    prompt = [5, 6, 7]
    with_a = Running(clean, "team/a:1", prompt, LONG)
    ((alone, second),) = lora_info(clean)
    assert alone == {**labels, "running_lora_adapters": "team/a:1"}
    streams = [with_a, Running(clean, "b", prompt, LONG), Running(clean, BASE, prompt, LONG)]
    ((together, third),) = lora_info(clean)
    assert together == {**labels, "running_lora_adapters": "b,team/a:1"}
    assert first < second < third
    for stream in streams:
        stream.disconnect()
    assert eventually(lambda: lora_info(clean)[0][0] == labels)
    assert len(lora_info(clean)) == 1


def test_a_replaced_adapter_goes_by_its_name_once(clean: Api) -> None:
    assert clean.load("m", "lora").status_code == 200
    old = Running(clean, "m", [5, 6, 7], LONG)
    assert clean.load("m", "mola", load_inplace=True).status_code == 200
    new = Running(clean, "m", [5, 6, 7], LONG)
    assert [labels["running_lora_adapters"] for labels, _ in lora_info(clean)] == ["m"]
    for stream in (old, new):
        stream.disconnect()
