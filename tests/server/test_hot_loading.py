"""Adapters of every further format over HTTP: loaded, asked, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.api_client import Api, copy_adapter, edit_config


@pytest.fixture(scope="module")
def placed(api: Api, authored: Any) -> dict[str, str]:
    """Copies of tests/support/authored.py's adapters below the server's root, by name."""
    for name, made in authored.items():
        shutil.copytree(made.path, api.root / "authored" / name)
    return {name: f"authored/{name}" for name in authored}


def test_they_are_loaded_by_name_and_answer_as_their_authors_do(
    clean: Api, authored: Any, placed: dict[str, str]
) -> None:
    for name, path in placed.items():
        answer = clean.load(name, path)
        assert (answer.status_code, answer.json()["status"]) == (200, "loaded"), answer.text
    for name, made in authored.items():
        prompt = made.prompts[0]
        assert tuple(clean.greedy(name, list(prompt.ids))) == prompt.greedy, name


def test_a_mix_is_unchanged_or_another_by_its_content(clean: Api, placed: dict[str, str]) -> None:
    assert clean.load("m", placed["mix"]).json()["kind"] == "mix"
    assert clean.load("m", placed["mix"]).json()["status"] == "unchanged"
    file = Path(clean.root, placed["mix"], "molehill_mix.json")
    before = file.read_text()
    document = json.loads(before)
    document["adapters"]["formal"] = 0.5
    file.write_text(json.dumps(document))
    assert clean.load("m", placed["mix"], load_inplace=True).json()["status"] == "replaced"
    file.write_text(before)


def test_a_bad_mix_is_refused_without_the_servers_paths(clean: Api, placed: dict[str, str]) -> None:
    folder = Path(clean.root, "authored", "bad")
    shutil.copytree(Path(clean.root, placed["mix"]), folder)
    (folder / "german" / "adapter_model.safetensors").write_bytes(b"cut")
    status, kind, message = clean.error(clean.load("bad", "authored/bad"))
    assert (status, kind) == (422, "corrupt_file")
    assert "german/adapter_model.safetensors" in message
    assert str(clean.root) not in message


def test_a_field_that_nobody_knows_is_named_wherever_the_adapter_is_shown(clean: Api) -> None:
    edit_config(copy_adapter("lora", clean.root / "strange"), scale_twice=True)
    answer = clean.load("strange", "strange")
    assert answer.status_code == 200, answer.text
    shown = clean.http.get("/v1/adapters/strange").json()
    for warnings in (answer.json()["warnings"], shown["warnings"]):
        assert [
            text for text in warnings if "does not know" in text and "scale_twice = True" in text
        ]


def test_a_layout_of_experts_belongs_to_an_adapter_that_has_them(clean: Api) -> None:
    body = {"name": "x", "source": "lora", "lora_b_layout": "grouped_by_expert"}
    status, kind, message = clean.error(clean.http.post("/v1/adapters", json=body))
    assert (status, kind) == (422, "unsupported")
    assert "lora_b_layout: found grouped_by_expert, expected none" in message
    answer = clean.http.post("/v1/adapters", json={**body, "lora_b_layout": "by_row"})
    assert answer.status_code == 400
    assert "lora_b_layout" in answer.text


def test_experts_by_unsloth_that_do_not_say_their_layout_are_refused(clean: Api) -> None:
    folder = copy_adapter("experts-unsloth-grouped", clean.root / "unsloth")
    edit_config(folder, lora_B_layout=None)
    body = {"name": "x", "source": "unsloth"}
    status, kind, message = clean.error(clean.http.post("/v1/adapters", json=body))
    assert (status, kind) == (422, "invalid_config")
    assert "rank_major or grouped_by_expert" in message
    # Said, it is read; that it is for another base comes next.
    said = {**body, "lora_b_layout": "grouped_by_expert"}
    status, _, message = clean.error(clean.http.post("/v1/adapters", json=said))
    assert (status, "lora_B_layout" in message) == (422, False)


def test_x_lora_is_refused_with_the_reason(clean: Api) -> None:
    status, kind, message = clean.error(clean.load("x", "xlora"))
    assert (status, kind) == (422, "unsupported")
    assert "a KV cache of its own" in message
