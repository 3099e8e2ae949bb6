"""What adapters have on the vocabulary, against the plain formulas."""

import dataclasses

import pytest
import torch
from torch import Tensor

from molehill.kernels.checks import WeightsError
from molehill.kernels.interface import Run
from molehill.kernels.mixture import Experts, VocabularyRows
from molehill.kernels.vocabulary import Vocabulary
from molehill.kernels.vocabulary_pieces import VocabularyPiece, VocabularyPieces, VocabularyShape

TOKENS, PADDING, HIDDEN, RANK = 11, 5, 8, 2
RUNS = [Run(0, 1, 4), Run(2, 4, 5), Run(0, 6, 7)]


def pieces(seed: int) -> VocabularyPieces:
    generator = torch.Generator().manual_seed(seed)

    def pair(inputs: int, outputs: int) -> Experts:
        a = torch.randn(RANK, inputs, generator=generator)
        return Experts(a, torch.randn(outputs, RANK, generator=generator), (RANK,))

    return VocabularyPieces(
        VocabularyPiece("embed_tokens", pair(TOKENS, HIDDEN)),
        VocabularyPiece("lm_head", pair(HIDDEN, TOKENS)),
    )


def vocabulary(dtype: torch.dtype = torch.float32) -> Vocabulary:
    made = Vocabulary()
    made.register_embedding(VocabularyShape(TOKENS, HIDDEN, dtype))
    made.register_head(VocabularyShape(TOKENS, HIDDEN, dtype))
    return made


def test_rows_replace_the_bases_and_pairs_add_to_them() -> None:
    made, pair = vocabulary(), pieces(0)
    table = VocabularyRows(torch.tensor([2, 3, 10]), torch.randn(3, HIDDEN))
    assert pair.embedding is not None
    assert pair.head is not None
    made.store(
        1,
        VocabularyPieces(
            dataclasses.replace(pair.embedding, rows=table),
            dataclasses.replace(pair.head, rows=table),
        ),
    )
    assert made.resident_bytes(1) == 2 * (4 * RANK * (TOKENS + HIDDEN) + 3 * (4 * HIDDEN + 8))
    weight, bias = torch.randn(TOKENS + PADDING, HIDDEN), torch.randn(TOKENS + PADDING)
    adapted = weight.clone()
    adapted[table.ids] = table.rows
    ids, x = torch.tensor([1, 2, 10, 0, 3]), torch.randn(5, HIDDEN)
    looked_up, logits = weight[ids], x @ weight.T + bias
    expected, expected_logits = looked_up.clone(), logits.clone()
    a, b = pair_of(pair.embedding)
    expected[1:] = (adapted[ids] + a.T[ids] @ b.T)[1:]
    a, b = pair_of(pair.head)
    expected_logits[1:] = (x @ adapted.T + bias)[1:]
    expected_logits[1:, :TOKENS] += x[1:] @ a.T @ b.T
    made.begin_step([Run(1, 1, 5)])
    made.begin_logits([Run(1, 1, 3), Run(1, 3, 5)])
    made.embed(looked_up, ids)
    made.project(logits, x, bias)
    assert (looked_up - expected).abs().max() < 1e-5
    assert (logits - expected_logits).abs().max() < 1e-5


@pytest.mark.parametrize("ids", [[3, 2], [2, 2], [-1, 2], [2, TOKENS]], ids=str)
def test_ids_that_are_none_of_this_part_are_refused(ids: list[int]) -> None:
    table = VocabularyRows(torch.tensor(ids), torch.ones(2, HIDDEN))
    with pytest.raises(WeightsError, match="lm_head: ids"):
        vocabulary().store(0, VocabularyPieces(head=VocabularyPiece("lm_head", None, table)))


def pair_of(piece: VocabularyPiece | None) -> tuple[Tensor, Tensor]:
    assert piece is not None
    assert piece.pair is not None
    return piece.pair.a, piece.pair.b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_rows_get_what_their_slots_hold(dtype: torch.dtype, tolerance: float) -> None:
    made, held = vocabulary(dtype), {0: pieces(0), 2: pieces(1)}
    for slot, piece in held.items():
        made.store(slot, piece)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, TOKENS, (8,), generator=generator)
    x = torch.randn(8, HIDDEN, generator=generator).to(dtype)
    looked_up, logits = torch.zeros(8, HIDDEN, dtype=dtype), torch.zeros(8, TOKENS + PADDING)
    logits = logits.to(dtype)
    expected_rows, expected_logits = looked_up.float(), logits.float()
    for run in RUNS:
        rows = slice(run.start, run.stop)
        a, b = pair_of(held[run.slot].embedding)
        expected_rows[rows] = a.T[ids[rows]] @ b.T
        a, b = pair_of(held[run.slot].head)
        expected_logits[rows, :TOKENS] = x[rows].float() @ a.T @ b.T
    made.begin_step([*RUNS, Run(1, 5, 6)])
    made.begin_logits(RUNS)
    made.embedding_op(looked_up, ids)
    made.project(logits, x)
    assert (looked_up.float() - expected_rows).abs().max() < tolerance
    assert (logits.float() - expected_logits).abs().max() < tolerance


def test_slots_are_freed_and_nothing_is_left_of_a_bad_piece() -> None:
    made, stored = vocabulary(), pieces(0)
    made.store(3, stored)
    assert made.has_head(3)
    assert made.resident_bytes(3) == 2 * 4 * RANK * (TOKENS + HIDDEN)
    made.erase(3)
    assert not made.has_head(3)
    assert made.resident_bytes(3) == 0
    wide = VocabularyPiece(
        "lm_head", Experts(torch.ones(1, HIDDEN + 1), torch.ones(TOKENS, 1), (1,))
    )
    with pytest.raises(WeightsError, match="lm_head: a"):
        made.store(3, VocabularyPieces(stored.embedding, wide))
    assert made.resident_bytes(3) == 0
    with pytest.raises(WeightsError, match="a registered head"):
        Vocabulary().store(0, VocabularyPieces(head=stored.head))


def test_added_tokens_are_seen_by_the_rows_of_their_adapters_alone() -> None:
    extra, tokens = 3, TOKENS + 3
    made = Vocabulary(extra)
    made.register_head(VocabularyShape(tokens, HIDDEN))
    for slot, answered in ((0, [0, 2]), (1, []), (2, [1])):
        ids = torch.tensor([TOKENS + token for token in answered] or [0])
        table = VocabularyRows(ids, torch.ones(len(ids), HIDDEN))
        tokens_of_all_ranks = torch.tensor(answered) if answered else None
        piece = VocabularyPiece("lm_head", None, table)
        made.store(slot, VocabularyPieces(head=piece, answered=tokens_of_all_ranks))
    logits = torch.randn(8, tokens)
    before = logits.clone()
    made.begin_logits([*RUNS, Run(1, 5, 6)])
    made.hide_added(logits)
    seen = torch.zeros(8, extra, dtype=torch.bool)
    seen[[1, 2, 3, 6]] = torch.tensor([True, False, True])
    seen[4, 1] = True
    assert torch.equal(logits[:, :TOKENS], before[:, :TOKENS])
    assert torch.equal(logits[:, TOKENS:][seen], before[:, TOKENS:][seen])
    assert bool((logits[:, TOKENS:][~seen] == -torch.inf).all())
    made.begin_logits([])
    made.erase(0)
    made.hide_added(before)
    assert bool((before[:, TOKENS:] == -torch.inf).all())


def test_rows_beyond_a_lookup_are_left_out() -> None:
    """A draft model that shares the embedding looks up fewer."""
    made = vocabulary()
    made.store(0, pieces(0))
    made.begin_step([Run(0, 1, 2), Run(0, 4, 9)])
    out = torch.zeros(3, HIDDEN)
    made.embed(out, torch.tensor([1, 2, 3]))
    assert out.any(1).tolist() == [False, True, False]
