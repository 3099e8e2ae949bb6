"""The table of token ids in a `molehill_mix.json`: which adapter a token has, by its id.

`token_adapters` is an object of lists, by the adapters' names: token ids, and spans of them
`[first, last]`, both included. `other_tokens` names the adapter of all others; without it they have
none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molehill.engine.adapter.token_validation import FIELD, MOST_TOKENS
from molehill.engine.formats.io.fields import Fields

OTHER = "other_tokens"

Span = tuple[int, int]


def read(config: Fields, names: Sequence[str]) -> tuple[Tensor, int]:
    """int64 `[n]`, the place of each token id's adapter among the names, -1 for none; and that of
    all ids from n on. Raises ConfigError."""
    other_name = config.text(OTHER)
    if other_name is not None and other_name not in names:
        raise config.error(OTHER, f"one of {', '.join(names)}")
    other = -1 if other_name is None else names.index(other_name)
    lists = config.object(FIELD)
    for name in lists.values:
        if name not in names:
            raise config.error(FIELD, f"lists for {', '.join(names)} alone, not for {name[:80]!a}")
    spans = []
    for place, name in enumerate(names):
        if name in lists.values:
            spans += [(span, place) for span in _spans(lists, name)]
        elif place != other:
            expected = f"a list for {name} too, or {name} as {OTHER}"
            raise config.error(FIELD, expected)
    spans.sort()
    table = torch.full((max((last for (_, last), _ in spans), default=0) + 1,), other)
    before = -1
    for (first, last), place in spans:
        if first <= before:
            raise config.error(FIELD, f"every token once, and {first} is there twice")
        table[first : last + 1] = place
        before = last
    return table, other


def _spans(lists: Fields, name: str) -> list[Span]:
    expected = f"a list of token ids below {MOST_TOKENS}, and of [first, last] of spans of them"
    items = lists.values[name]
    if not isinstance(items, list) or not items:
        raise lists.error(name, expected)
    spans = [tuple(item) if isinstance(item, list) else (item, item) for item in items]
    if not all(map(_is_span, spans)):
        raise lists.error(name, expected)
    return spans


def _is_span(span: tuple[Any, ...]) -> bool:
    whole = len(span) == 2 and all(type(token) is int for token in span)
    return whole and 0 <= span[0] <= span[1] < MOST_TOKENS
