"""A running server follows its adapters file."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from support.api_client import Api, eventually, oracle


@pytest.fixture
def followed(clean: Api) -> Iterator[Api]:
    """The shared server; afterwards its file wants nothing again."""
    assert clean.adapters_file is not None
    yield clean
    clean.adapters_file.write_text("[]")
    assert eventually(lambda: desired(clean)["data"] == [] and desired(clean)["converged"])


def listed(api: Api) -> dict[str, Any]:
    answer: dict[str, Any] = api.http.get("/v1/adapters").json()
    return answer


def desired(api: Api) -> dict[str, Any]:
    result: dict[str, Any] = listed(api)["desired"]
    return result


def states(api: Api) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in desired(api)["data"]}


def write(api: Api, document: Any) -> None:
    assert api.adapters_file is not None
    api.adapters_file.write_text(yaml.safe_dump(document))


def test_the_server_converges_to_its_file(followed: Api) -> None:
    assert followed.http.get("/health/ready").status_code == 200
    assert followed.load("mine", "mola").status_code == 200
    lora, dynmole = ({"name": "a", "source": case} for case in ("lora", "dynmole-soft"))
    wrong = {"name": "wrong", "source": "mola", "digest": "0" * 64}
    write(followed, [lora, wrong, {"name": "gone", "source": "no-such-directory"}])
    final_states = {"a": "converged", "wrong": "failed", "gone": "failed"}
    assert eventually(lambda: states(followed) == final_states)
    errors = {entry["name"]: entry for entry in desired(followed)["data"]}
    assert errors["wrong"]["error_type"] == "source_changed"
    assert f"expected {'0' * 64}" in errors["wrong"]["error"]
    assert errors["gone"]["error_type"] == "adapter_not_found"
    assert errors["gone"]["retry_seconds"] is not None
    wanted = {info["name"]: info["wanted_by"] for info in listed(followed)["data"]}
    assert wanted == {
        **dict.fromkeys(final_states, "adapters_file"),
        **{"started": "command_line", "mine": None},
    }
    metrics = followed.metrics()
    assert metrics['molehill_desired_adapters{state="converged"}'] == 1
    assert metrics['molehill_desired_adapters{state="failed"}'] == 2
    assert metrics["molehill_adapters_file_age_seconds"] < 60
    prompt = oracle("lora")["prompts"][0]
    assert followed.greedy("a", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    # Other weights under the name, which a client then takes away.
    write(followed, [dynmole])
    digest = followed.load("b", "dynmole-soft").json()["digest"]
    generation = lambda: followed.http.get("/v1/adapters/a").json().get("generation")  # noqa: E731
    assert eventually(lambda: generation() == digest)
    assert followed.unload("a").status_code == 200
    assert eventually(lambda: generation() == digest)
    # Half a file changes nothing, and is told.
    assert followed.adapters_file is not None
    followed.adapters_file.write_text("- {name: a, source")
    assert eventually(lambda: desired(followed)["error_type"] == "invalid_adapters_file")
    assert str(followed.adapters_file) not in json.dumps(listed(followed))
    assert (generation(), states(followed)) == (digest, {"a": "converged"})
    assert followed.http.get("/health/ready").status_code == 200
    write(followed, [])
    assert eventually(lambda: "a" not in followed.models())
    assert {"mine", "b", "started"} <= followed.models().keys()


def test_the_syncers_file_does_what_the_syncer_does(followed: Api) -> None:
    assert followed.load("old", "mola").status_code == 200
    write(
        followed,
        {
            "vLLMLoRAConfig": {
                "name": "any",
                "port": 8000,
                "defaultBaseModel": "tiny",
                "ensureExist": {"models": [{"id": "a", "source": "lora"}]},
                "ensureNotExist": {"models": [{"id": "old", "source": "mola"}]},
            }
        },
    )
    assert eventually(lambda: "a" in followed.models() and "old" not in followed.models())
    assert eventually(lambda: desired(followed)["converged"])
