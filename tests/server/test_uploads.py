"""Adapters that are sent: whole, in parts, too large, cut off, under names that lead elsewhere."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_client import KEY, Api, eventually, oracle
from support.uploads import Files, files_of, safetensors_of, split, upload, uploads_left, weights

PROMPT = oracle("mixlora")["prompts"][0]


@pytest.fixture(scope="module")
def mixlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return safetensors_of("mixlora", tmp_path_factory.mktemp("sent") / "mixlora")


@pytest.fixture(autouse=True)
def nothing_is_left(api: Api) -> Any:
    copies = set(api.store.iterdir())
    yield
    assert eventually(lambda: not uploads_left(api.store))
    left = {path.name for path in set(api.store.iterdir()) - copies}
    # A test's own adapters are unloaded after this; the manifest is written again.
    served = {f"chat-{info['generation']}" for info in loaded(api)} | {
        info["generation"] for info in loaded(api)
    }
    assert left <= served | {"manifest.json"}


def loaded(api: Api) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = api.http.get("/v1/adapters").json()["data"]
    return result


def test_a_mixture_that_is_sent_serves_as_one_that_is_loaded(clean: Api, mixlora: Path) -> None:
    limits: dict[str, Any] = {"requests_in_flight": 50, "tokens_per_second": None}
    limits |= {"tenant": "sender", "tenant_slots": 7}
    fields = {"name": "m", "pinned": "true", "expected_generation": ""}
    fields["limits"] = json.dumps(limits)
    answer = upload(clean, files_of(mixlora), fields)
    assert answer.status_code == 200, answer.text
    sent = answer.json()
    assert (sent["status"], sent["source"], sent["pinned"]) == ("loaded", "upload://m", True)
    assert sent["limits"] == limits
    assert answer.headers["Molehill-Generation"] == sent["generation"]
    assert clean.greedy("m", PROMPT["prompt_token_ids"]) == PROMPT["greedy_token_ids"]
    by_path = clean.load("by-path", "mixlora").json()
    assert by_path["digest"] == sent["generation"]
    again = upload(clean, files_of(mixlora), {"name": "m", "pinned": "false"}).json()
    assert (again["status"], again["pinned"]) == ("unchanged", False)
    for text, result in (
        ("{", "limits: found '{'"),
        ("[" * 5000, "limits: found '[[["),
        ('{"requests_in_flight": 0}', "found 0"),
    ):
        refused = upload(clean, files_of(mixlora), {"name": "m", "limits": text})
        assert clean.error(refused)[:2] == (422, "invalid_limits")
        assert result in clean.error(refused)[2]


def test_a_version_that_is_sent_replaces_the_one_that_is_expected(
    clean: Api, mixlora: Path, tmp_path: Path
) -> None:
    first = upload(clean, files_of(mixlora), {"name": "m"}).json()
    lora = files_of(safetensors_of("lora", tmp_path / "lora"))
    for expected in ("", "0" * 64):
        answer = upload(clean, lora, {"name": "m", "expected_generation": expected})
        assert clean.error(answer)[:2] == (409, "generation_mismatch")
    fields = {"name": "m", "expected_generation": first["generation"]}
    assert upload(clean, lora, fields).json()["status"] == "replaced"
    prompt = oracle("lora")["prompts"][0]
    assert clean.greedy("m", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def test_shards_and_what_else_lies_beside_them(clean: Api, mixlora: Path, tmp_path: Path) -> None:
    whole = upload(clean, files_of(mixlora), {"name": "whole"}).json()
    folder = safetensors_of("mixlora", tmp_path / "mixlora")
    split(folder)
    (folder / "README.md").write_text("---\nbase_model: tiny\n---\n")
    (folder / "training_args.bin").write_bytes(b"not read")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    answer = upload(clean, files_of(folder), {"name": "m", "chat_template": "base"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["generation"] == whole["generation"]


def test_the_openai_client_and_curl_send_them(clean: Api, mixlora: Path) -> None:
    sent = clean.openai.post(
        "/adapters",
        cast_to=object,
        body={"name": "m"},
        files=[("file", (path.name, path.read_bytes())) for path in mixlora.iterdir()],
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    assert isinstance(sent, dict)
    assert sent["status"] == "loaded"
    command = ["curl", "-sS", f"{clean.url}/v1/adapters", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-F", "name=m"]
    for path in mixlora.iterdir():
        command += ["-F", f"file=@{path}"]
    try:
        said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("there is no curl on this machine")
    assert '"status":"unchanged"' in said


GOOD: Files = [("file", ("adapter_config.json", b"{}"))]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a//x", "./x", ".hidden", "a/.x", "", "x\ny", "é", "a" * 256],
)
def test_names_that_lead_elsewhere_are_refused(api: Api, name: str) -> None:
    quoted = name.replace("\n", "%0A")
    body = (
        '--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n'
        f'--b\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n\r\n'
        "x\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = api.http.post("/v1/adapters", content=body.encode(), headers=headers)
    status, kind, message = api.error(answer)
    assert (status, kind) == (400, "invalid_upload")
    assert message.startswith("file name: found ")
    assert "x" not in api.models()


@pytest.mark.parametrize(
    ("files", "fields", "status", "kind", "message"),
    [
        ([*GOOD, *GOOD], {}, 400, "invalid_upload", "adapter_config.json: found it twice"),
        ([*GOOD, ("file", ("a", b"")), ("file", ("a/b", b""))], {}, 400, "invalid_upload", "a/b"),
        ([("file", ("adapter_model.bin", b""))], {}, 422, "unsupported", "molehill convert"),
        ([("file", ("a/adapter_model.bin", b""))], {}, 422, "unsupported", "a pickle"),
        ([("weights", ("x", b""))], {}, 400, "invalid_upload", "'weights': found a file"),
        (GOOD, {"pinned": "perhaps"}, 400, "Bad Request", "pinned"),
        (GOOD, {"pined": "true"}, 400, "Bad Request", "pined"),
        (GOOD, {"source": "lora"}, 400, "Bad Request", "source"),
        (GOOD, {"file": "lora"}, 400, "invalid_upload", "'file': found no filename"),
        (GOOD, {"name": "a/../b"}, 400, "invalid_name", "name"),
        (GOOD, {"pinned": "x" * 70_000}, 400, "invalid_upload", "at most 65536"),
        (GOOD, {}, 422, "missing_tensor", "upload: found no weights"),
    ],
)
def test_what_is_no_adapter_is_refused(
    api: Api, files: Files, fields: dict[str, str], status: int, kind: str, message: str
) -> None:
    result = api.error(upload(api, files, {"name": "x", **fields}))
    assert result[:2] == (status, kind), result
    assert message in result[2]
    assert str(api.store) not in result[2]
    assert "x" not in api.models()


def test_a_form_without_files_name_or_end_is_refused(api: Api, mixlora: Path) -> None:
    answer = upload(api, files_of(mixlora), {})
    assert answer.status_code == 400
    assert "name" in api.error(answer)[2]
    for body, message in (
        (b"--b--\r\n", "file: found none"),
        (b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx', "no end of the form"),
        (b"not a form", "body: found"),
        (b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n', "expected UTF-8"),
    ):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = api.http.post("/v1/adapters", content=body, headers=headers)
        assert api.error(answer)[:2] == (400, "invalid_upload"), body
        assert message in api.error(answer)[2]
    for parameter, message in (("", "found none"), ("; boundary=" + 71 * "b", "one of 71 bytes")):
        headers = {"Content-Type": f"multipart/form-data{parameter}"}
        answer = api.http.post("/v1/adapters", content=b"x", headers=headers)
        assert api.error(answer)[:2] == (400, "invalid_upload")
        assert message in api.error(answer)[2]


def test_a_bad_adapter_is_refused_as_one_that_is_loaded(api: Api, tmp_path: Path) -> None:
    folder = safetensors_of("lora", tmp_path / "lora")
    weights(folder).write_bytes(weights(folder).read_bytes()[:5000])
    status, kind, message = api.error(upload(api, files_of(folder), {"name": "x"}))
    assert (status, kind) == (422, "corrupt_file")
    assert message.startswith("adapter_model.safetensors: ")
    answer = upload(api, files_of(folder)[:1], {"name": "x"})
    assert api.error(answer)[:2] == (422, "missing_tensor")
    assert "x" not in api.models()


def test_a_body_over_the_limit_is_refused_before_and_while_it_comes(api: Api) -> None:
    """The limit is the one that conftest.py starts the server with."""
    large = b"x" * (2 << 20)
    status, kind, message = api.error(upload(api, [("file", ("a", large))], {"name": "x"}))
    assert (status, kind) == (413, "upload_too_large")
    assert f"at most {1 << 20} bytes (--max-upload-bytes)" in message
    assert "bytes or more" not in message

    def pieces() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(32):
            yield b"x" * (64 << 10)
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = api.http.post("/v1/adapters", content=pieces(), headers=headers)
    status, kind, message = api.error(answer)
    assert (status, kind) == (413, "upload_too_large")
    assert "bytes or more, expected at most" in message


def test_a_client_that_hangs_up_leaves_nothing(api: Api, mixlora: Path) -> None:
    body = httpx.Request("POST", api.url, data={"name": "x"}, files=files_of(mixlora))
    content = body.read()
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: {body.headers['content-type']}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    url = httpx.URL(api.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + content[: len(content) // 2])
        assert eventually(lambda: bool(uploads_left(api.store)))
    assert eventually(lambda: not uploads_left(api.store))
    assert "x" not in api.models()
    assert api.metrics()['molehill_adapter_loads_refused_total{kind="invalid_upload"}'] > 0


def test_a_form_without_a_key_is_not_read(api: Api, mixlora: Path) -> None:
    answer = httpx.post(f"{api.url}/v1/adapters", data={"name": "x"}, files=files_of(mixlora))
    assert answer.status_code == 401
    assert "x" not in api.models()
