"""What is told of a pair's rank without factorising it, against its singular values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.engine.transform.merge import NUMERICAL_RANK
from molehill.engine.transform.rank import surely_full

IN, OUT = 60, 40


def pair(a_values, b_values, seed=0, scale=1.0):
    """A and B with these singular values."""
    generator = torch.Generator().manual_seed(seed)

    def factor(values, size):
        rank = len(values)
        left, right = (
            torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
            for n in (size, rank)
        )
        return left * torch.tensor(values, dtype=torch.float64) @ right.T

    return (scale * factor(a_values, IN).T).float(), (scale * factor(b_values, OUT)).float()


def full(a, b):
    """From the dense product in float64."""
    values = torch.linalg.svdvals(b.double() @ a.double())
    return bool(values[len(a) - 1] > NUMERICAL_RANK * values[0])


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e12])
@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-4])
def test_pairs_far_from_the_limit_are_told(least, scale):
    a, b = pair([1.0] * 8, [1.0] * 7 + [least], scale=scale)
    assert surely_full(a, b, NUMERICAL_RANK)


def test_random_pairs_of_high_rank_are_told():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 1024, generator=generator)
    b = torch.randn(512, 64, generator=generator)
    assert surely_full(a, b, NUMERICAL_RANK)


def test_what_the_sample_does_not_show_all_of_it_does():
    a, b = pair([1.0] * 4, [1.0] * 4)
    a[:, :16] = b[:16] = 0
    assert surely_full(a, b, NUMERICAL_RANK)


@pytest.mark.parametrize("lost", ["a", "b", "rows"])
def test_a_pair_of_lower_rank_never_is(lost):
    a, b = pair([1.0] * 4, [1.0] * 4)
    if lost == "a":
        a[3] = a[0]
    elif lost == "b":
        b[:, 1] = 0
    else:
        a, b = a[:, :3], b
    assert not surely_full(a, b, NUMERICAL_RANK)


exponents = st.lists(st.floats(-9, 0), min_size=3, max_size=3)


@pytest.mark.slow
@given(exponents, exponents, st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_it_is_never_told_of_a_pair_that_is_not(a_exponents, b_exponents, seed):
    a, b = pair([10**e for e in a_exponents], [10**e for e in b_exponents], seed)
    assert full(a, b) or not surely_full(a, b, NUMERICAL_RANK)
