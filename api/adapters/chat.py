"""How an adapter is talked to, where its own tokenizer files differ from its base's."""

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import msgspec

from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.adapter.errors import AdapterError, CorruptFileError
from molehill.engine.formats.io import files, tokenizer_files
from molehill.engine.formats.io.tokenizer_files import DEFAULT, TOOL_USE, TokenizerFiles, TokenText

# Whose template chat requests get: the adapter's, where it has one, or the base's.
ChatTemplate = Literal["adapter", "base"]

_SHOWN_TOKENS = 8
# Of one that is kept: as many as its templates and special tokens may have.
_KEPT_BYTES = 8 << 20


@dataclass(frozen=True)
class BaseChat:
    """The base's: templates by DEFAULT and TOOL_USE, special tokens, ids by token, and the id that
    ends its answers, if any.

    takes: whether its tokenizer can have these tokens added, at their ids; None if it takes none.
    """

    templates: Mapping[str, str | None] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    eos_token_id: int | None = None
    takes: Callable[[tuple[TokenText, ...]], bool] | None = None


class AdapterChat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What an adapter has of its own, each empty where it has not.

    templates: Jinja by DEFAULT and TOOL_USE. special_tokens: those that templates see, by what they
    are for. stop_token_ids: those that end its answers beside the base's. warnings: what of the
    tokenizer is not served. token_texts: that the adapter's tokenizer has and the base's lacks, at
    the ids that follow the base's; which of them are served goes by the adapter's rows.
    """

    templates: dict[str, str] = {}
    special_tokens: dict[str, str] = {}
    stop_token_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    token_texts: tuple[TokenText, ...] = ()

    def template(self, with_tools: bool) -> str | None:
        """As Transformers chooses; None for the base's."""
        chosen = self.templates.get(TOOL_USE) if with_tools else None
        return chosen or self.templates.get(DEFAULT)

    @property
    def tokens_alone(self) -> "AdapterChat | None":
        """What is left of it where the adapter is chatted with as the base is."""
        return AdapterChat(token_texts=self.token_texts) if self.token_texts else None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all of it."""
        return hashlib.sha256(encode(self)).hexdigest()

    def shown(self) -> dict[str, Any] | None:
        """Before clients; None if nothing is served. The templates' names, with their sha256."""
        if not (self.templates or self.special_tokens or self.stop_token_ids):
            return None
        digests = {
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.templates.items()
        }
        return {
            "templates": digests,
            "special_tokens": self.special_tokens,
            "stop_token_ids": list(self.stop_token_ids),
        }


# Of an adapter's directory; None where its tokenizer is the base's. In any thread; raises
# AdapterError.
ReadChat = Callable[[Path], AdapterChat | None]


@dataclass(frozen=True)
class ChatReader:
    """A ReadChat. base: what is served."""

    base: BaseChat

    def __call__(self, directory: Path) -> AdapterChat | None:
        chat = differences(tokenizer_files.read(directory), self.base)
        return None if chat == AdapterChat() else chat


def differences(adapter: TokenizerFiles, base: BaseChat | None) -> AdapterChat:
    """What the adapter's files say otherwise than the base's tokenizer does; all that they say
    where nothing is known of that. Ids are then those of the files."""
    served = AdapterChat(dict(adapter.templates))
    if base is None:
        return AdapterChat(served.templates, dict(adapter.special_tokens), adapter.stop_token_ids)
    texts = _following(adapter.token_texts, base)
    same = all(
        served.template(name == TOOL_USE) in (None, base.templates.get(name))
        for name in (DEFAULT, TOOL_USE)
    )
    special_tokens = {
        name: token
        for name, token in adapter.special_tokens.items()
        if token != base.special_tokens.get(name)
    }
    added = {text.text: text.id for text in texts}
    token = adapter.special_tokens.get("eos_token", "")
    eos = base.vocabulary.get(token, added.get(token))
    stops = {eos, *adapter.stop_token_ids} - {None, base.eos_token_id}
    ids = {*base.vocabulary.values(), *added.values()} if stops else set()
    return AdapterChat(
        {} if same else dict(served.templates),
        special_tokens,
        tuple(sorted(token for token in stops if token is not None and token in ids)),
        tuple(_warnings(adapter, base, added)),
        texts,
    )


def _following(texts: Sequence[TokenText], base: BaseChat) -> tuple[TokenText, ...]:
    """Those that the base lacks, from its next id on without a gap, as tokenizers number them."""
    lacking = [text for text in texts if text.text not in base.vocabulary]
    first = max(base.vocabulary.values(), default=-1) + 1
    following = tuple(text for i, text in enumerate(lacking, first) if text.id == i)
    if not following or base.takes is None or following != tuple(lacking[: len(following)]):
        return ()
    return following if base.takes(following) else ()


def served_texts(
    chat: AdapterChat | None, added: AddedTokens, num_tokens: int | None
) -> tuple[TokenText, ...]:
    """Those that prompts may hold: at ids of the base's own vocabulary, and of added tokens that
    have a row. num_tokens: of that vocabulary."""
    if chat is None or num_tokens is None:
        return ()
    read = {*added.read}
    return tuple(takewhile(lambda t: t.id < num_tokens or t.id in read, chat.token_texts))


def without_rows(chat: AdapterChat | None, served: Sequence[TokenText]) -> tuple[str, ...]:
    """Warnings of those that are not served."""
    texts = () if chat is None else chat.token_texts[len(served) :]
    if not texts:
        return ()
    lacking = _shown([text.text for text in texts])
    return (
        f"tokenizer: found added tokens that the base's lacks: {lacking}; without rows, they are "
        "read in prompts as the text that they are",
    )


def _warnings(adapter: TokenizerFiles, base: BaseChat, added: Container[str]) -> list[str]:
    tokens = dict.fromkeys((*adapter.added_tokens, *adapter.special_tokens.values()))
    lacking = [token for token in tokens if token not in base.vocabulary and token not in added]
    warnings = [
        f"tokenizer: found {text.text!r} at id {text.id}, expected {base.vocabulary[text.text]} as "
        "in the base's, which is used"
        for text in adapter.token_texts
        if base.vocabulary.get(text.text, text.id) != text.id
    ]
    if lacking:
        warnings.append(
            f"tokenizer: found added tokens that the base's lacks: {_shown(lacking)}; in prompts "
            "they are read as the text that they are"
        )
    return warnings


def _shown(tokens: Sequence[str]) -> str:
    shown = ", ".join(repr(token[:80]) for token in tokens[:_SHOWN_TOKENS])
    more = f" and {len(tokens) - _SHOWN_TOKENS} more" if len(tokens) > _SHOWN_TOKENS else ""
    return shown + more


def digest_of(chat: AdapterChat | None) -> str:
    """Empty for None."""
    return "" if chat is None else chat.digest


def encode(chat: AdapterChat) -> bytes:
    """As it is kept; one without added tokens as earlier releases kept it."""
    fields = msgspec.to_builtins(chat)
    if not chat.token_texts:
        del fields["token_texts"]
    return msgspec.json.encode(fields, order="sorted")


def read_kept(path: Path, digest: str) -> AdapterChat:
    """What `encode` made of the one of that digest. Raises CorruptFileError."""
    try:
        text = files.read_text(path.parent, path.name, _KEPT_BYTES)
        chat = msgspec.json.decode(text, type=AdapterChat)
    except (AdapterError, ValueError, RecursionError) as error:
        raise CorruptFileError(path.name, error, "the store's own copy") from None
    if chat.digest != digest:
        raise CorruptFileError(path.name, chat.digest, f"the digest {digest}")
    return chat
