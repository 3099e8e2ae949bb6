"""Experts by a classifier's gate weights against the definition, token by token."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molehill.kernels.checks import WeightsError
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.classifier import Classifier, ClassifierPiece, ClassifierPieces
from molehill.kernels.interface import LinearShape, Run
from molehill.kernels.mixture import Experts

HIDDEN, INPUTS, OUTPUTS, HANDLE = 12, 20, 14, 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classifier(places: int = 2, layerwise: bool = True, **options) -> Classifier:
    outputs = 3 * (places if layerwise else 1)
    layers = (
        (random(8, HIDDEN, seed=1), random(8, seed=2)),
        (random(outputs, 8, seed=3), random(outputs, seed=4)),
    )
    return Classifier(layers, 3, places, layerwise, **options)


def piece(place: int, start: int, width: int, seed: int) -> ClassifierPiece:
    ranks = (2, 1, 3)
    a, b = random(6, INPUTS, seed=seed) / 4, random(width, 6, seed=seed + 1) / 2
    return ClassifierPiece(f"layers.0.p{place}", start, Experts(a, b, ranks), place)


def serving(dtype: torch.dtype = torch.float32) -> ClassifiedLinears:
    result = ClassifiedLinears(HIDDEN)
    result.register(HANDLE, LinearShape("qkv", INPUTS, OUTPUTS, dtype))
    result.register(5, LinearShape("other", INPUTS, OUTPUTS, dtype))
    return result


PIECES = (piece(0, 0, 6, seed=10), piece(1, 8, 6, seed=20))


def expected(x: Tensor, hidden: Tensor, by: Classifier) -> Tensor:
    """Token by token, expert by expert."""
    y = torch.zeros(len(x), OUTPUTS)
    for t in range(len(x)):
        read = hidden[t].float()
        (w1, b1), (w2, b2) = by.layers
        scalings = w2 @ torch.relu(w1 @ read + b1) + b2
        for each in PIECES:
            of_place = scalings.view(-1, 3)[each.place if by.layerwise else 0]
            weights = torch.softmax(of_place / by.temperature, 0) if by.softmax else of_place
            if by.top_k:
                least = weights.sort(descending=True).values[by.top_k - 1]
                weights = torch.where(weights >= least, weights, 0.0)
            if by.softmax_top_k:
                exponents = torch.where(weights != 0, weights.exp(), 0.0)
                weights = exponents / exponents.sum()
            columns = slice(each.start, each.start + 6)
            for e, (a, b) in enumerate(each.experts.split()):
                y[t, columns] += weights[e] * (b @ (a @ x[t].float()))
    return y


OPTIONS = (
    {},
    {"temperature": 0.4, "layerwise": False},
    {"softmax": False, "top_k": 2},
    {"top_k": 2, "softmax_top_k": True},
    {"top_k": 1},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_get_what_their_classifier_weighs(dtype, options):
    by, other = classifier(**options), classifier(temperature=3.0)
    linears = serving(dtype)
    linears.store(7, ClassifierPieces(by, {HANDLE: PIECES}))
    linears.store(2, ClassifierPieces(other, {HANDLE: PIECES}))
    # Rows of one slot in two runs, rows of others, and rows that pad the step.
    runs = [Run(7, 0, 3), Run(2, 3, 5), Run(4, 5, 6), Run(7, 6, 9)]
    x, hidden = random(12, INPUTS, seed=30).to(dtype), random(12, HIDDEN, seed=31).to(dtype)
    base = random(12, OUTPUTS, seed=32).to(dtype)
    linears.begin_pass(runs)
    out = base.clone()
    linears.add(out, x, HANDLE)
    assert torch.equal(out, base)
    linears.classify(hidden)
    linears.add(out, x, HANDLE)
    wanted = base.float()
    for rows, who in (([0, 1, 2, 6, 7, 8], by), ([3, 4], other)):
        wanted[rows] += expected(x[rows], hidden[rows], who)
    torch.testing.assert_close(out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(out[[5, 9, 10, 11]], base[[5, 9, 10, 11]])
    again = out.clone()
    linears.add(again, x, 5)
    linears.end_step()
    linears.add(again, x, HANDLE)
    assert torch.equal(again, out)


def test_experts_may_act_in_the_first_pass():
    linears = serving()
    linears.store(0, ClassifierPieces(classifier(first_pass=0.5), {HANDLE: PIECES}))
    x = random(4, INPUTS, seed=33)
    linears.begin_pass([Run(0, 1, 4)])
    out = torch.zeros(4, OUTPUTS)
    linears.add(out, x, HANDLE)
    wanted = torch.zeros(4, OUTPUTS)
    for each in PIECES:
        columns = slice(each.start, each.start + 6)
        wanted[1:, columns] = 0.5 * x[1:] @ each.experts.a.T @ each.experts.b.T
    torch.testing.assert_close(out, wanted)


def test_a_slot_takes_memory_until_it_is_erased():
    linears = serving()
    linears.store(1, None)
    assert (linears.has_classifier(1), linears.resident_bytes(1)) == (False, 0)
    linears.store(1, ClassifierPieces(classifier(), {HANDLE: PIECES}))
    floats = 6 * (INPUTS + 6) * 2 + 8 * HIDDEN + 8 + 6 * 8 + 6
    assert linears.resident_bytes(1) == 4 * floats
    linears.erase(1)
    assert (linears.has_classifier(1), linears.resident_bytes(1)) == (False, 0)


WRONG = {
    "hidden": (HIDDEN + 1, PIECES, HANDLE),
    "handle": (HIDDEN, PIECES, 9),
    "columns": (HIDDEN, [replace(PIECES[0], start=9)], HANDLE),
    "place": (HIDDEN, [replace(PIECES[0], place=2)], HANDLE),
    "experts": (
        HIDDEN,
        [replace(PIECES[0], experts=replace(PIECES[0].experts, ranks=(3, 3)))],
        HANDLE,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_and_not_kept(what):
    hidden, pieces, handle = WRONG[what]
    linears = ClassifiedLinears(hidden)
    linears.register(HANDLE, LinearShape("qkv", INPUTS, OUTPUTS))
    with pytest.raises(WeightsError):
        linears.store(0, ClassifierPieces(classifier(), {handle: pieces}))
    assert not linears.has_classifier(0)
