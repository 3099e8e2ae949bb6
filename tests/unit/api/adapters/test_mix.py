"""How clients write a mix, and what it is of."""

from typing import Any

import pytest

from molehill.api.adapters.errors import BadMixError
from molehill.api.adapters.mix import Mix, MixPart, check_weights, parse


def mix(**weights: float) -> Mix:
    """Of adapters whose content is called as the first letter of their names."""
    return Mix(tuple(MixPart(name, weight, name[0]) for name, weight in weights.items()))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a=0.7, b=0.3", {"a": 0.7, "b": 0.3}),
        ("team/a@v2:x=-1,b+c=1e-1", {"team/a@v2:x": -1.0, "b+c": 0.1}),
        (" a = 1 ", {"a": 1.0}),
        ("stra%C3%9Fe=2", {"straße": 2.0}),
    ],
)
def test_a_header_is_names_and_weights(text: str, weights: dict[str, float]) -> None:
    assert parse(text) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found '', expected NAME=WEIGHT"),
        ("a", "found 'a', expected NAME=WEIGHT"),
        ("a=", "found 'a=', expected NAME=WEIGHT"),
        ("=1", "found '=1', expected NAME=WEIGHT"),
        ("a=1,", "found '', expected NAME=WEIGHT"),
        ("a=1=2", "found 'a=1=2', expected NAME=WEIGHT"),
        ("a=much", "found 'a=much', expected NAME=WEIGHT"),
        ("a=1, a=2", "found 'a' twice"),
        ("a=nan", "'a': found nan, expected a number from -100 to 100"),
        ("a=-inf", "'a': found -inf"),
        ("a=0, b=-0", "weights of 0 alone"),
    ],
)
def test_a_header_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadMixError, match=f"^mix: .*{message}"):
        parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "found {}, expected weights by the names"),
        ([], r"found \[\], expected weights"),
        (["a"], r"found \['a'\], expected weights"),
        ("a=1", "found 'a=1', expected weights"),
        ({"a": "1"}, "'a': found '1', expected a number"),
        ({"a": True}, "'a': found True, expected a number"),
        ({"a": None}, "'a': found None, expected a number"),
        ({"a": 10**400}, "'a': found 1000"),
        ({"a": 100.5}, "'a': found 100.5, expected a number from -100 to 100"),
        ({"\ud800": [1]}, r"'\\ud800': found \[1\]"),
        ({str(i): 1 for i in range(17)}, "found 17 adapters, expected at most 16"),
    ],
)
def test_weights_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(BadMixError, match=f"^mix: {message}"):
        check_weights(given)


def test_weights_are_kept_as_they_are_given() -> None:
    assert check_weights({"b": 100, "a": -0.25, "c": 0}) == {"b": 100.0, "a": -0.25, "c": 0.0}


def test_equal_mixes_have_one_key_however_they_are_written() -> None:
    key = mix(a=0.75, b=0.25).key
    assert key == (("a", 0.75), ("b", 0.25))
    assert mix(b=0.25, a=0.75).key == key
    assert mix(b=0.25, a1=0.5, c=0.0, a2=0.25).key == key
    assert mix(a=0.25, b=0.75).key != key
    assert mix(a=1.0, a2=-1.0).key == ()


def test_an_adapter_with_weight_1_is_itself() -> None:
    assert (mix(a=1.0).lone, mix(a=0.5, a2=0.5, b=0.0).lone) == ("a", "a")
    assert {mix(a=0.5).lone, mix(a=1.0, b=1.0).lone, mix(a=-1.0).lone} == {None}


def test_a_label_is_as_a_header_has_it() -> None:
    label = mix(a=0.7, b=-3.0).label
    assert (label, parse(label)) == ("a=0.7, b=-3", {"a": 0.7, "b": -3.0})
