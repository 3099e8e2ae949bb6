"""Tokens that an adapter adds to its base's vocabulary, held against the base's room for them."""

from collections.abc import Mapping

import pytest
import torch

from molehill.engine.adapter.added_tokens import AddedTokens, added_tokens
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import problems
from molehill.engine.formats import DEFAULT_LIMITS
from molehill.kernels.mixture import Experts, LinearMixture, VocabularyRows
from molehill.kernels.policy import Constant

TOKENS, HIDDEN = 10, 4


def base(extra_tokens: int) -> BaseModel:
    vocabulary = {"embed_tokens": (TOKENS, HIDDEN), "lm_head": (HIDDEN, TOKENS)}
    return BaseModel("base", "Any", {}, {}, vocabulary=vocabulary, extra_tokens=extra_tokens)


def rows(*ids: int) -> VocabularyRows:
    return VocabularyRows(torch.tensor(ids), torch.ones(len(ids), HIDDEN))


def pair(inputs: int, outputs: int) -> LinearMixture:
    experts = Experts(torch.ones(1, inputs), torch.ones(outputs, 1), (1,))
    return LinearMixture(experts, Constant((1.0,)))


def refusals(
    extra_tokens: int,
    tables: Mapping[str, VocabularyRows],
    sites: Mapping[str, LinearMixture] | None = None,
) -> list[AdapterError]:
    return problems(Adapter("lora", sites or {}, rows=tables), base(extra_tokens), DEFAULT_LIMITS)


def test_which_tokens_are_read_and_answered() -> None:
    tables = {"embed_tokens": rows(3, 10, 11), "lm_head": rows(9, 10)}
    assert refusals(2, tables) == []
    adapter = Adapter("lora", {}, rows=tables)
    assert added_tokens(adapter, TOKENS) == AddedTokens(TOKENS, (10, 11), (10,))
    assert added_tokens(adapter, TOKENS).needed == (10, 11)
    assert not added_tokens(Adapter("lora", {}, rows={"lm_head": rows(9)}), TOKENS)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (0, "the base's 10; a server with --extra-vocab 3 takes it"),
        (2, "the base's 10 and at most 2 more; a server with --extra-vocab 3 takes it"),
    ],
)
def test_more_tokens_than_there_is_room_for(extra: int, expected: str) -> None:
    (error,) = refusals(extra, {"embed_tokens": rows(12)})
    assert isinstance(error, UnsupportedError)
    assert error.where == "embed_tokens.row_ids"
    assert error.found == "13 tokens, 3 of them added to the base's vocabulary"
    assert error.expected == expected


def test_an_answer_is_read_again() -> None:
    (error,) = refusals(3, {"embed_tokens": rows(10), "lm_head": rows(10, 12)})
    assert error.where == "lm_head.row_ids"
    assert error.found == "a row for the added token 12, and none of the embedding"


@pytest.mark.parametrize("site", ["embed_tokens", "lm_head"])
def test_a_pair_needs_the_rows_that_it_adds_to(site: str) -> None:
    wide = pair(12, HIDDEN) if site == "embed_tokens" else pair(HIDDEN, 12)
    whole = {"embed_tokens": rows(10, 11), "lm_head": rows(10, 11)}
    assert refusals(2, whole, {site: wide}) == []
    assert refusals(4, whole, {site: wide}) == []
    (error,) = refusals(2, {**whole, site: rows(10)}, {site: wide})[:1]
    assert error.found in (
        "a pair of 12 tokens, and no row for the added token 11",
        "a row for the added token 11, and none of the embedding",
    )
    assert "wrong_shape" in [error.kind for error in refusals(1, {}, {site: wide})]
    assert refusals(2, {}, {site: pair(*base(2).vocabulary[site])}) == []
