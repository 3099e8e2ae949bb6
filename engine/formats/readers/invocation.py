"""`alora_invocation_tokens` of a config, PEFT's name for what activates an adapter.

PEFT 0.21 writes it for LoRA; any other format may have it and means the same by it.
"""

from dataclasses import replace

from molehill.engine.adapter.errors import LimitError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields

FIELD = "alora_invocation_tokens"

# Every prompt is searched for them, at each of its places in the worst case.
MOST_TOKENS = 256

# What PEFT 0.21 refuses beside it ("unsupported variant combination").
_NOT_BESIDE = {"use_dora": "DoRA", "target_parameters": "LoRA on parameters"}


def read(config: Fields) -> tuple[int, ...]:
    """The token ids; empty where there are none (as in PEFT, an empty list too). Raises
    ConfigError, LimitError."""
    tokens = config.values.get(FIELD)
    if tokens is None or tokens == []:
        return ()
    if not isinstance(tokens, list) or not all(
        type(token) is int and token >= 0 for token in tokens
    ):
        raise config.error(FIELD, "a list of token ids")
    if len(tokens) > MOST_TOKENS:
        raise LimitError(
            f"{config.where}: {FIELD}", f"{len(tokens)} tokens", f"at most {MOST_TOKENS}"
        )
    return tuple(tokens)


def activated(adapter: Adapter, config: Fields) -> Adapter:
    """The adapter with the tokens that its config names. Raises ConfigError, UnsupportedError."""
    tokens = read(config)
    if not tokens:
        return adapter
    if adapter.kind in ("lora", "dora"):
        expected = "none beside alora_invocation_tokens, as PEFT has no such adapter"
        for name, meaning in _NOT_BESIDE.items():
            if config.values.get(name):
                raise UnsupportedError(f"{config.where}: {name}", meaning, expected)
    return replace(adapter, invocation_tokens=tokens)
