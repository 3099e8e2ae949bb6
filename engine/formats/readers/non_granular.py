"""`non_granular_after` of an X-LoRA: how many tokens of an answer get scalings of their own.

No trainer writes it, for it says how the adapter is served: mistral.rs has it as the option
`tgt_non_granular_index` of a server (docs/NON_GRANULAR.md there, "non-granular scalings").
"""

from dataclasses import replace

from molehill.engine.adapter.errors import LimitError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields

FIELD = "non_granular_after"
OPTION = "--non-granular-after"
# More than any answer has.
MOST = (1 << 31) - 1


def read(config: Fields) -> int | None:
    """None where every token has its own. Raises ConfigError."""
    if not config.has(FIELD):
        return None
    tokens = config.number(FIELD, at_least=0, at_most=MOST)
    if tokens != int(tokens):
        raise config.error(FIELD, "a whole number of at least 0")
    return int(tokens)


def of_config(config: Fields) -> int | None:
    """Of any format's config, molehill's own among them. Raises ConfigError."""
    return read(config.object("classifier") if config.has("classifier") else config)


def with_given(adapter: Adapter, tokens: int | None) -> Adapter:
    """The adapter as whoever loads it wants it. Raises LimitError, and UnsupportedError of one
    without a classifier, and where its config says another number."""
    if tokens is None:
        return adapter
    if tokens > MOST:
        raise LimitError(FIELD, tokens, f"at most {MOST}")
    if adapter.classifier is None:
        expected = f"none, as scalings are X-LoRA's and this is {adapter.kind}"
        raise UnsupportedError(FIELD, tokens, expected)
    said = adapter.classifier.non_granular_after
    if said not in (None, tokens):
        raise UnsupportedError(FIELD, tokens, f"{said}, as the adapter's config says")
    classifier = replace(adapter.classifier, non_granular_after=tokens)
    warnings = adapter.warnings if said == tokens else (*adapter.warnings, warning(tokens))
    return replace(adapter, classifier=classifier, warnings=warnings)


def warning(tokens: int) -> str:
    """How the answers of such an adapter differ from PEFT's."""
    last = f"of token {tokens} of the answer" if tokens else "of the prompt's last token"
    return (
        f"{FIELD} is {tokens}: later tokens of an answer are computed with the scalings {last}, in "
        f"one pass; PEFT gives each its own. The first {tokens + 1} tokens are PEFT's, later ones "
        "may be others"
    )
