"""How a base model is talked to, by its tokenizer's files: what an adapter's are compared with."""

import logging

from molehill.api.adapters.chat import BaseChat
from molehill.engine.formats.io.tokenizer_files import DEFAULT, TOOL_USE

logger = logging.getLogger(__name__)


def of_model(model: str | None) -> BaseChat | None:
    """None without a model, or where its tokenizer cannot be read: nothing is known of it then."""
    if model is None:
        return None
    # Heavy: only who names a model need wait for it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (ImportError, OSError, ValueError) as error:
        logger.debug("no tokenizer of %s: %s", model, error)
        return None
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {DEFAULT: templates}
    default = named.get(DEFAULT)
    return BaseChat(
        {DEFAULT: default, TOOL_USE: named.get(TOOL_USE, default)},
        dict(tokenizer.special_tokens_map),
        tokenizer.get_vocab(),
        tokenizer.eos_token_id,
        (lambda _: True) if tokenizer.is_fast else None,
    )
