"""What control planes of fleets ask of a server, in their order: bodies, paths, what they take for
success. docs/fleet.md says of which versions of them.

They are Go programs and containers of a cluster; these are their requests.
"""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.api_client import BASE, Api

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def ids(api: Api) -> set[str]:
    """As all of them read the list."""
    answer = api.http.get("/v1/models")
    assert answer.status_code == 200
    return {model["id"] for model in answer.json()["data"]}


class Syncer:
    """The LoRA syncer of the Gateway API Inference Extension: sidecar.py's LoraReconciler."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.asked: list[str] = []

    def reconcile(self, exist: dict[str, str], not_exist: set[str], base: str) -> None:
        """Raises httpx.HTTPStatusError, as `requests` does there."""
        assert self._api.http.get("/health").status_code == 200
        for name, source in exist.items():
            if name not in ids(self._api):
                payload = {"lora_name": name, "lora_path": source, "base_model_name": base}
                self._post(LOAD, payload)
        for name in not_exist:
            if name in ids(self._api):
                self._post(UNLOAD, {"lora_name": name})

    def _post(self, path: str, payload: dict[str, str]) -> None:
        self.asked.append(path)
        self._api.http.post(path, json=payload).raise_for_status()


def test_the_lora_syncer(clean: Api) -> None:
    syncer = Syncer(clean)
    syncer.reconcile({"a": "lora", "b": "mola"}, {"c"}, base="any/base")
    assert {"a", "b"} <= ids(clean)
    # Every five seconds again.
    syncer.reconcile({"a": "lora", "b": "mola"}, {"c"}, base="")
    syncer.reconcile({"a": "lora"}, {"b"}, base="")
    assert syncer.asked == [LOAD, LOAD, UNLOAD]
    assert "b" not in ids(clean)
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        syncer.reconcile({"x": "no-such-directory"}, set(), base="")


class Aibrix:
    """AIBrix's ModelAdapter controller without its runtime sidecar: lora_client.go."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def load(self, name: str, artifact_url: str) -> tuple[bool, bool]:
        """Whether it was loaded, whether it was there already."""
        if name in ids(self._api):
            return False, True
        path = artifact_url.removeprefix("huggingface://")
        answer = self._api.http.post(LOAD, json={"lora_name": name, "lora_path": path})
        assert answer.status_code in (200, 201), answer.text
        return True, False

    def unload(self, name: str) -> int:
        return self._api.http.post(UNLOAD, json={"lora_name": name}).status_code


def test_aibrix(clean: Api) -> None:
    aibrix = Aibrix(clean)
    assert aibrix.load("a", f"{clean.root}/lora") == (True, False)
    assert aibrix.load("a", f"{clean.root}/lora") == (False, True)
    assert aibrix.unload("a") == 200
    # It unloads also what is gone, and only logs the answer.
    assert aibrix.unload("a") == 404
    with pytest.raises(AssertionError, match="no such directory"):
        aibrix.load("x", "huggingface://owner/name")


class ProductionStack:
    """The LoRA controller of the vLLM production stack: loraadapter_controller.go."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def registrations(self) -> dict[str, dict[str, Any]]:
        """What it takes for adapters: models with a parent."""
        document = self._request("GET", "/v1/models", None)
        assert document["object"] == "list"
        result = {}
        for model in document["data"]:
            for field, kind in FIELDS.items():
                assert isinstance(model[field], kind), field
            if model["parent"] is not None:
                result[model["id"]] = model
        return result

    def load(self, name: str, path: str) -> None:
        self._request("POST", LOAD, {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        self._request("POST", UNLOAD, {"lora_name": name})

    def _request(self, method: str, path: str, payload: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        answer = self._api.http.request(method, path, json=payload, headers=headers)
        if answer.status_code != 200:
            raise RuntimeError(f"unexpected status code: {answer.status_code}: {answer.text}")
        document: dict[str, Any] = answer.json()
        return document


FIELDS = {"id": str, "object": str, "created": int, "owned_by": str, "root": str}


def test_the_production_stack(clean: Api) -> None:
    stack = ProductionStack(clean)
    before = stack.registrations()
    assert BASE not in before
    stack.load("a", f"{clean.root}/lora")
    registration = stack.registrations()["a"]
    assert registration["parent"] == BASE
    # It compares how many adapters there are with how many pods, and loads what it has loaded.
    stack.load("a", f"{clean.root}/lora")
    with pytest.raises(RuntimeError, match=r"400: .*has already been loaded"):
        stack.load("a", f"{clean.root}/mola")
    stack.unload("a")
    assert stack.registrations().keys() == before.keys()
    with pytest.raises(RuntimeError, match="404"):
        stack.unload("a")


def test_the_endpoint_picker_finds_its_metrics(clean: Api) -> None:
    """The model server protocol of the Inference Extension: queue, KV cache, block size and
    adapters. No key is sent."""
    assert clean.load("routed", "lora").status_code == 200
    clean.complete("routed", [5, 6, 7], 2)
    text = httpx.get(f"{clean.url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    one: Callable[[str], Any] = lambda name: next(s for s in samples if s.name == name)  # noqa: E731
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert one(f"vllm:{name}").value >= 0
    assert int(one("vllm:cache_config_info").labels["block_size"]) > 0
    (info,) = [s for s in samples if s.name == "vllm:lora_requests_info"]
    assert info.labels.keys() == {
        *("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    }
    assert int(info.labels["max_lora"]) > 1
