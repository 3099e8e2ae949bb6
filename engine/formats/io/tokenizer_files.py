"""The tokenizer files that trainers save beside an adapter: chat templates and special tokens.

By the names and the precedence of Transformers: a template's own file stands in for the one in
tokenizer_config.json.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from molehill.engine.adapter.errors import ConfigError, LimitError
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.system.out_of_memory import raise_if_out_of_memory

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
# What Transformers chooses among by itself: without tools, and with them.
DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATES: Mapping[str, str] = {
    DEFAULT: "chat_template.jinja",
    TOOL_USE: "additional_chat_templates/tool_use.jinja",
}

# Of one template. The longest that are published have 30 thousand.
TEMPLATE_BYTES = 256 << 10
CONFIG_BYTES = 16 << 20
# By name, with its bytes at most: what is fetched with an adapter, if it is there.
SMALL_FILES: Mapping[str, int] = {
    **dict.fromkeys(TEMPLATES.values(), TEMPLATE_BYTES),
    TOKENIZER_CONFIG: CONFIG_BYTES,
    GENERATION_CONFIG: CONFIG_BYTES,
}

# Added tokens stand before the vocabulary, which is far longer and not read.
_TOKENIZER_BYTES = 4 << 20
# Of a token: ids below, as many digits, and characters at most.
_MOST_TOKENS, _DIGITS, _TOKEN_LENGTH = 1 << 24, 8, 512
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TokenText(NamedTuple):
    """An added token as a tokenizer's files have it. special: left out of answers' text. lstrip,
    rstrip: whether it takes the spaces before or after it. single_word: only as a word of its own.
    normalized: found after the tokenizer has normalised the text."""

    text: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """What they say; empty where they do not.

    templates: Jinja by DEFAULT and TOOL_USE, each of which compiles. special_tokens: by what they
    are for, `eos_token` and the like. added_tokens: beyond the vocabulary that the tokenizer was
    trained with, special or not. stop_token_ids: what ends an answer by generation_config.json.
    token_texts: those of added_tokens whose entries are complete, with their ids.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    added_tokens: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    token_texts: tuple[TokenText, ...] = ()


def read(directory: Path) -> TokenizerFiles:
    """Those of an adapter's directory. Raises ConfigError, CorruptFileError, LimitError."""
    config = _config(directory, TOKENIZER_CONFIG)
    entries = _added_entries(directory, config)
    tokens = (entry.get("content") for entry in entries)
    return TokenizerFiles(
        _templates(directory, config),
        dict(_special_tokens(config)),
        tuple(dict.fromkeys(token for token in tokens if isinstance(token, str))),
        _stop_token_ids(_config(directory, GENERATION_CONFIG)),
        _token_texts(entries),
    )


def check_template(where: str, text: str) -> None:
    """Raises ConfigError, which names the line, for what Transformers cannot compile."""
    # Heavy, and few adapters have templates.
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        place, found = f"{where}: line {error.lineno}", error.message
        raise ConfigError(place, found, "a Jinja template") from None
    except ImportError:
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        raise ConfigError(where, type(error).__name__, "a Jinja template") from None


def _config(directory: Path, name: str) -> Fields:
    if not (directory / name).exists():
        return Fields(name, {})
    return files.read_config(directory, name)


def _templates(directory: Path, config: Fields) -> dict[str, str]:
    there = {name: file for name, file in TEMPLATES.items() if (directory / file).exists()}
    if there:
        texts = {
            name: (file, files.read_text(directory, file, TEMPLATE_BYTES))
            for name, file in there.items()
        }
    else:
        texts = dict(_config_templates(config))
    for where, text in texts.values():
        check_template(where, text)
    return {name: text for name, (_, text) in texts.items()}


def _config_templates(config: Fields) -> Iterator[tuple[str, tuple[str, str]]]:
    """Of tokenizer_config.json: (name, (where it stands, text)) of one template, or of many."""
    value, where = config.values.get("chat_template"), f"{config.where}: chat_template"
    if value is None:
        return
    entries = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(map(_is_named_template, entries)):
        raise config.error("chat_template", "a Jinja template, or a list of named ones")
    for entry in entries:
        name, text = entry["name"], entry["template"]
        if name not in TEMPLATES:
            continue
        if not _is_encodable(text):
            raise config.error("chat_template", "text without lone surrogates")
        size = len(text.encode())
        if size > TEMPLATE_BYTES:
            raise LimitError(where, f"{size} bytes", f"at most {TEMPLATE_BYTES} bytes")
        yield name, (where, text)


def _is_encodable(text: str) -> bool:
    """JSON may spell halves of characters, which no UTF-8 has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("name", "template")
    )


def _special_tokens(config: Fields) -> Iterator[tuple[str, str]]:
    for name in _SPECIAL_TOKENS:
        value = config.values.get(name)
        # As text, or with what becomes of the spaces beside it.
        token = value.get("content") if isinstance(value, dict) else value
        if token is None:
            continue
        if not isinstance(token, str) or not _is_encodable(token) or len(token) > _TOKEN_LENGTH:
            raise config.error(name, f"a token of at most {_TOKEN_LENGTH} characters")
        yield name, token


def _added_entries(directory: Path, config: Fields) -> list[dict[str, Any]]:
    """By tokenizer_config.json, or by tokenizer.json, where Transformers 5 has them alone."""
    listed = config.values.get("added_tokens_decoder")
    entries: list[Any] = []
    if isinstance(listed, dict):
        entries = [
            # Python reads no number of thousands of digits.
            {**entry, "id": int(number) if len(number) <= _DIGITS else None}
            for number, entry in listed.items()
            if isinstance(entry, dict) and number.isascii() and number.isdecimal()
        ]
    entries += _listed_in_tokenizer(directory / TOKENIZER)
    return [entry for entry in entries if isinstance(entry, dict)]


def _token_texts(entries: Sequence[Mapping[str, Any]]) -> tuple[TokenText, ...]:
    """By id, the first of two for one id; less what tokenizers would not take."""
    by_id: dict[int, TokenText] = {}
    for entry in entries:
        text, number = entry.get("content"), entry.get("id")
        if not isinstance(text, str) or not text or not _is_encodable(text):
            continue
        if type(number) is int and 0 <= number < _MOST_TOKENS and len(text) <= _TOKEN_LENGTH:
            flags = {name: bool(entry.get(name, False)) for name in _FLAGS}
            by_id.setdefault(number, TokenText(text, number, **flags))
    return tuple(by_id[number] for number in sorted(by_id))


def _listed_in_tokenizer(path: Path) -> list[Any]:
    """`added_tokens` of tokenizer.json, none where it does not stand at its start."""
    start = files.read_start(path, _TOKENIZER_BYTES).decode(errors="replace")
    _, key, rest = start.partition('"added_tokens":')
    if not key:
        return []
    try:
        entries, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    except (ValueError, RecursionError):
        return []
    return entries if isinstance(entries, list) else []


def _stop_token_ids(config: Fields) -> tuple[int, ...]:
    value = config.values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise config.error("eos_token_id", "a token id, or a list of them")
    return tuple(ids)
