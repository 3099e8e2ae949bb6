"""What an adapters file says, and what is told of one that says nothing."""

import json

import pytest

from molehill.api.sources.adapters_file import AdaptersFileError, DesiredAdapter, parse

DIGEST = "0123456789abcdef" * 4

YAML = b"""
# The first comment
- name: sql
  source: hf://org/sql
  revision: v2
  pinned: yes
- {name: chat, source: team/chat, digest: %s, weight: 2}
""" % DIGEST.encode()


def test_json_and_yaml_say_the_same() -> None:
    sql = {"name": "sql", "source": "hf://org/sql", "revision": "v2", "pinned": True}
    chat = {"name": "chat", "source": "team/chat", "digest": DIGEST, "weight": 2}
    desired = parse(YAML)
    assert desired == parse(json.dumps([sql, chat]).encode())
    assert [adapter.name for adapter in desired.adapters] == ["chat", "sql"]
    assert desired.by_name["sql"].location == "hf://org/sql@v2"
    assert desired.by_name["chat"].pinned is False
    assert desired.bad == ()


def test_nobody_is_wanted_by_an_empty_list() -> None:
    assert parse(b"[]").adapters == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found nothing"),
        (b"# only a comment\n", "found nothing"),
        (b"adapters: []", "expected a list of adapters or vLLMLoRAConfig"),
        (b"text", "found 'text'"),
        (b"[1, 2", "neither JSON nor YAML"),
        (b"\xff\xfe", "neither JSON nor YAML"),
        (b"- !!python/object/apply:os.system [true]", "neither JSON nor YAML"),
        (b"- 2024-99-99", "neither JSON nor YAML"),
        (b"[" * 100_000, "neither JSON nor YAML"),
        (b"vLLMLoRAConfig: 3", "vLLMLoRAConfig: found 3, expected a mapping"),
        (b"vLLMLoRAConfig: {ensureExist: []}", "ensureExist: found []"),
        (b"vLLMLoRAConfig: {ensureExist: {models: x}}", "expected models with a list"),
    ],
)
def test_what_is_no_such_file_is_told(content: bytes, message: str) -> None:
    with pytest.raises(AdaptersFileError) as error:
        parse(content)
    assert message in str(error.value)
    assert str(error.value).startswith("--adapters-file: ")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x"}, "source: found nothing, expected it"),
        ({"source": "s"}, "name: found nothing, expected it"),
        ({"name": 3, "source": "s"}, "name: found 3"),
        ({"name": "x", "source": ""}, "source: found ''"),
        ({"name": "a b", "source": "s"}, "'a b'"),
        ({"name": "x", "source": "s", "pined": True}, "pined: found an unknown field, expected"),
        ({"name": "x", "source": "s", "pinned": "yes"}, "pinned: found 'yes'"),
        ({"name": "x", "source": "s", "digest": "abc"}, "digest: found 'abc'"),
        ({"name": "x", "source": "s", "revision": "v1"}, "revision: found 'v1' beside"),
        ({"name": "x", "source": "hf://o/n@v1", "revision": "v2"}, "revision: found 'v2' beside"),
        ({"name": "x", "source": "s", "lora_b_layout": "by_row"}, "lora_b_layout: found 'by_row'"),
        (
            {"name": "x", "source": "s", "limits": {"requests_in_flight": True}},
            "limits.requests_in_flight: found True, expected a whole number from 1 to 1000000",
        ),
        ("x", "found 'x', expected a mapping"),
    ],
)
def test_a_bad_entry_is_named_and_the_others_hold(fields: object, message: str) -> None:
    good = {"name": "good", "source": "g"}
    desired = parse(json.dumps([good, fields]).encode())
    assert desired.adapters == (DesiredAdapter(name="good", source="g"),)
    (bad,) = desired.bad
    assert message in bad.message
    assert "entry 2" in bad.message
    name = fields.get("name") if isinstance(fields, dict) else None
    assert bad.name == (name if isinstance(name, str) else None)


@pytest.mark.parametrize("entry", [b"%s", b"{name: x, source: s, pinned: %s}"])
def test_a_number_that_python_does_not_write_is_an_entrys_error(entry: bytes) -> None:
    desired = parse(b"- {name: good, source: g}\n- " + entry % (b"0x" + b"f" * 5000))
    assert list(desired.by_name) == ["good"]
    assert "found a number of thousands of digits" in desired.bad[0].message


def test_of_a_name_given_twice_neither_holds() -> None:
    entries = [{"name": name, "source": f"s{n}"} for n, name in enumerate(("a", "b", "a"))]
    desired = parse(json.dumps(entries).encode())
    assert list(desired.by_name) == ["b"]
    (bad,) = desired.bad
    assert (bad.name, bad.message) == (
        "a",
        "--adapters-file: name: found 'a' 2 times, expected it once",
    )
    assert "a" in desired.named


def test_a_small_file_that_means_a_huge_tree_is_told_in_few_words() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(AdaptersFileError) as error:
        parse("\n".join(lines).encode())
    assert len(str(error.value)) < 400


def syncer(**config: object) -> bytes:
    return json.dumps({"vLLMLoRAConfig": config}).encode()


def models(*names: str) -> dict[str, object]:
    return {"models": [{"id": name, "source": f"org/{name}", "base-model": "b"} for name in names]}


def test_the_syncers_configuration_is_understood() -> None:
    desired = parse(
        syncer(
            name="any",
            host="localhost",
            port=8000,
            defaultBaseModel="base",
            ensureExist=models("a", "b"),
            ensureNotExist=models("b", "c"),
        )
    )
    assert [(adapter.name, adapter.source) for adapter in desired.adapters] == [("a", "org/a")]
    # It knows no pins, and its sources are written as for vLLM.
    assert (desired.adapters[0].pinned, desired.adapters[0].vllm_source) == (None, True)
    assert desired.absent == {"c"}
    (both,) = desired.bad
    assert both.name == "b"
    assert "found in ensureExist and ensureNotExist" in both.message


def test_the_syncers_entries_are_told_by_their_own_names() -> None:
    wrong = {"models": [{"id": "a"}, {"source": "org/b"}, 7]}
    desired = parse(syncer(ensureExist=wrong))
    assert [entry.name for entry in desired.bad] == ["a", None, None]
    assert "vLLMLoRAConfig.ensureExist 1 ('a'): source: found nothing" in desired.bad[0].message
    assert parse(syncer()).adapters == ()
