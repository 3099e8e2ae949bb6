"""What is read of an adapter's tokenizer files, against Transformers' own reading of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.golden import TINY_LLAMA
from transformers import AutoTokenizer

from molehill.engine.adapter.errors import (
    AdapterError,
    ConfigError,
    CorruptFileError,
    LimitError,
)
from molehill.engine.formats.io import tokenizer_files
from molehill.engine.formats.io.tokenizer_files import (
    DEFAULT,
    GENERATION_CONFIG,
    TEMPLATE_BYTES,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOOL_USE,
    TokenizerFiles,
    read,
)

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TOOLS = PLAIN + "{{ tools | tojson }}"


def saved(folder: Path, template: Any, in_config: bool = False) -> Path:
    """As a trainer saves it: the base's tokenizer with a template and a token more."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder, save_jinja_files=not in_config)
    return folder


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("template", [PLAIN, {DEFAULT: PLAIN, TOOL_USE: TOOLS, "rag": "{{ 1 }}"}])
def test_what_transformers_saved_is_read_as_transformers_reads_it(
    tmp_path: Path, template: Any, in_config: bool
) -> None:
    folder = saved(tmp_path / "adapter", template, in_config)
    assert (folder / TEMPLATES[DEFAULT]).exists() is not in_config
    expected = AutoTokenizer.from_pretrained(folder)
    result = read(folder)
    for name, tools in ((DEFAULT, None), (TOOL_USE, [])):
        text = result.templates.get(name) or result.templates[DEFAULT]
        assert text == expected.get_chat_template(tools=tools)
    assert result.special_tokens == expected.special_tokens_map
    added = [str(token) for token in expected.added_tokens_decoder.values()]
    assert result.added_tokens == tuple(added)
    assert "<|pad|>" in result.added_tokens


def test_a_file_stands_in_for_the_configs_template(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", TOOLS, in_config=True)
    (folder / TEMPLATES[DEFAULT]).write_text(PLAIN)
    assert read(folder).templates == {DEFAULT: PLAIN}
    assert AutoTokenizer.from_pretrained(folder).chat_template == PLAIN


def test_a_directory_without_any_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == TokenizerFiles()


@pytest.mark.parametrize(("value", "expected"), [(7, (7,)), ([7, 8], (7, 8)), (None, ())])
def test_a_generation_config_ends_answers(tmp_path: Path, value: Any, expected: Any) -> None:
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": value}))
    assert read(tmp_path).stop_token_ids == expected


BAD_LINE = "{{ bos_token }}\n{% for m in messages %}\n{% endif %}"


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        (TEMPLATES[DEFAULT], BAD_LINE, ConfigError, r"chat_template.jinja: line 3: .*endif"),
        (TEMPLATES[TOOL_USE], "{% x %}", ConfigError, r"tool_use.jinja: line 1: found Encountered"),
        (
            TEMPLATES[DEFAULT],
            "{{ x|nothing }}",
            ConfigError,
            "chat_template.jinja: line 1: .*filter",
        ),
        (TEMPLATES[DEFAULT], "x" * (TEMPLATE_BYTES + 1), LimitError, "at most 262144 bytes"),
        (TEMPLATES[DEFAULT], b"\xff", CorruptFileError, "UTF-8"),
        (
            TOKENIZER_CONFIG,
            json.dumps({"chat_template": "\n{{"}),
            ConfigError,
            "tokenizer_config.json: chat_template: line 2",
        ),
        (TOKENIZER_CONFIG, '{"chat_template": 3}', ConfigError, "chat_template: found 3"),
        (TOKENIZER_CONFIG, '{"chat_template": "\\ud800"}', ConfigError, "lone surrogates"),
        (TOKENIZER_CONFIG, '{"chat_template": [{"name": 1}]}', ConfigError, "list of named"),
        (
            TOKENIZER_CONFIG,
            json.dumps({"chat_template": "x" * (TEMPLATE_BYTES + 1)}),
            LimitError,
            "at most 262144 bytes",
        ),
        (TOKENIZER_CONFIG, '{"eos_token": 3}', ConfigError, "eos_token: found 3"),
        (TOKENIZER_CONFIG, json.dumps({"eos_token": "x" * 513}), ConfigError, "at most 512 char"),
        (TOKENIZER_CONFIG, "[", ConfigError, "malformed JSON"),
        (GENERATION_CONFIG, '{"eos_token_id": [1, -2]}', ConfigError, "eos_token_id"),
        (GENERATION_CONFIG, '{"eos_token_id": true}', ConfigError, "eos_token_id"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, file: str, content: str | bytes, error: type[AdapterError], message: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / TEMPLATES[DEFAULT])
    with pytest.raises(CorruptFileError, match="expected a regular file"):
        read(tmp_path)


def test_an_id_of_thousands_of_digits_is_that_of_no_token(tmp_path: Path) -> None:
    listed = {"9" * 5000: {"content": "<far>"}, "7": {"content": "<near>"}}
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps({"added_tokens_decoder": listed}))
    assert [text.id for text in read(tmp_path).token_texts] == [7]
    assert read(tmp_path).added_tokens == ("<far>", "<near>")


def test_a_tokenizer_that_is_none_says_nothing_of_added_tokens(tmp_path: Path) -> None:
    for text in ("", "[", '{"added_tokens":[{', '{"added_tokens": 3}', '{"added_tokens":[3]}'):
        (tmp_path / tokenizer_files.TOKENIZER).write_text(text)
        assert read(tmp_path).added_tokens == ()
