"""What adapters have on the vocabulary, in torch: on the embedding, and on the LM head.

The embedding's pair is a gather of A's columns by token id, then B; rows that replace the base's
are looked up in a sorted list of ids. Rows of logits are not those of a step: they are announced
for each call of the head. Nothing is launched where no adapter of the step has anything there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels import custom_ops
from molehill.kernels.checks import check_vocabulary
from molehill.kernels.interface import Run
from molehill.kernels.mixture import VocabularyRows
from molehill.kernels.run_rows import run_rows
from molehill.kernels.vocabulary_pieces import VocabularyPiece, VocabularyPieces, VocabularyShape


class RowTable:
    """One adapter's rows in the place of the base's."""

    def __init__(self, table: VocabularyRows, shape: VocabularyShape) -> None:
        self._ids = table.ids.to(shape.device)
        self._rows = table.rows.to(shape.device, shape.dtype).contiguous()

    @property
    def num_bytes(self) -> int:
        return self._ids.nbytes + self._rows.nbytes

    def embed(self, out: Tensor, ids: Tensor) -> None:
        places = torch.searchsorted(self._ids, ids).clamp_(max=len(self._ids) - 1)
        changed = self._ids[places] == ids
        out.copy_(torch.where(changed[:, None], self._rows[places], out))

    def project(self, logits: Tensor, x: Tensor, bias: Tensor | None) -> None:
        logits[:, self._ids] = F.linear(
            x, self._rows, None if bias is None else bias[self._ids]
        ).to(logits.dtype)


class VocabularyTable:
    """What one adapter has on the embedding, A kept by token, or on the head: its rows, and beside
    them its pair."""

    def __init__(
        self, piece: VocabularyPiece, shape: VocabularyShape, *, of_embedding: bool
    ) -> None:
        self._rows = RowTable(piece.rows, shape) if piece.rows and len(piece.rows.ids) else None
        self._pair = None
        if piece.pair is not None:
            a = piece.pair.a.T if of_embedding else piece.pair.a
            self._pair = (
                a.to(shape.device, shape.dtype).contiguous(),
                piece.pair.b.to(shape.device, shape.dtype).contiguous(),
            )

    @property
    def num_bytes(self) -> int:
        pair = sum(half.nbytes for half in self._pair or ())
        return pair + (0 if self._rows is None else self._rows.num_bytes)

    def embed(self, out: Tensor, ids: Tensor) -> None:
        """Changes `out [T, hidden]` in place; ids `[T]`: of this rank's part of the vocabulary."""
        if self._rows is not None:
            self._rows.embed(out, ids)
        if self._pair is not None:
            a, b = self._pair
            out.addmm_(F.embedding(ids, a), b.T)

    def project(self, logits: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """Changes `logits [T, tokens and padding]` in place; x `[T, hidden]`, bias `[tokens and
        padding]`: the base's, which rows keep."""
        if self._rows is not None:
            self._rows.project(logits, x, bias)
        if self._pair is not None:
            a, b = self._pair
            logits[:, : len(b)] += F.linear(F.linear(x, a), b).to(logits.dtype)


class Vocabulary:
    """The embedding and the LM head of one worker, and what the slots do to them.

    `embedding_op(out, ids)` is what a model's forward calls after its lookup. extra_tokens: ids
    after the base's own, each of which only the adapters see that have a row for it.
    """

    def __init__(self, extra_tokens: int = 0) -> None:
        self.extra_tokens = extra_tokens
        self._answered: dict[int, Tensor] = {}
        self._embedding: VocabularyShape | None = None
        self._head: VocabularyShape | None = None
        self._embeddings: dict[int, VocabularyTable] = {}
        self._heads: dict[int, VocabularyTable] = {}
        self._runs: list[Run] = []
        self._logits_runs: list[Run] = []
        self.embedding_op = torch.ops.molehill.embedding.default
        custom_ops.install_embedding(self.embed)

    def register_embedding(self, shape: VocabularyShape) -> None:
        """Called once, before any weights are stored."""
        self._embedding = shape

    def register_head(self, shape: VocabularyShape) -> None:
        """Called once, before any weights are stored."""
        self._head = shape

    def store(self, slot: int, pieces: VocabularyPieces) -> None:
        """Puts what an adapter has here into an empty slot; on error the slot stays empty.

        Raises WeightsError, MemoryError.
        """
        embedding = head = None
        if pieces.embedding is not None:
            shape = check_vocabulary(pieces.embedding, self._embedding, of_embedding=True)
            embedding = VocabularyTable(pieces.embedding, shape, of_embedding=True)
        if pieces.head is not None:
            shape = check_vocabulary(pieces.head, self._head, of_embedding=False)
            head = VocabularyTable(pieces.head, shape, of_embedding=False)
        if embedding is not None:
            self._embeddings[slot] = embedding
        if head is not None:
            self._heads[slot] = head
            if pieces.answered is not None:
                self._answered[slot] = pieces.answered.to(shape.device)

    def erase(self, slot: int) -> None:
        """Frees a slot."""
        self._embeddings.pop(slot, None)
        self._heads.pop(slot, None)
        self._answered.pop(slot, None)

    def resident_bytes(self, slot: int) -> int:
        """Bytes that the slot's serving copy takes."""
        tables = (self._embeddings.get(slot), self._heads.get(slot))
        return sum(table.num_bytes for table in tables if table is not None)

    def has_head(self, slot: int) -> bool:
        """Whether the slot changes logits at the head."""
        return slot in self._heads

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward; rows in no run belong to the base. Never raises."""
        self._runs = [run for run in runs if run.slot in self._embeddings]
        self._logits_runs = []

    def begin_logits(self, runs: Sequence[Run]) -> None:
        """Announces the rows of the head's next calls, until the next announcement."""
        self._logits_runs = [run for run in runs if run.slot in self._heads]

    def embed(self, out: Tensor, ids: Tensor) -> None:
        """Changes the base's lookup `out [T, hidden]` of ids `[T]`."""
        for slot in dict.fromkeys(run.slot for run in self._runs):
            rows = run_rows(self._runs, slot, len(ids), ids.device)
            y = out[rows]
            self._embeddings[slot].embed(y, ids[rows])
            if not isinstance(rows, slice):
                out[rows] = y

    def project(self, logits: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Changes the base's `logits [T, tokens and padding]` of x `[T, hidden]`, which have its
        bias if it has one."""
        for slot in dict.fromkeys(run.slot for run in self._logits_runs):
            rows = run_rows(self._logits_runs, slot, len(x), x.device)
            y = logits[rows]
            self._heads[slot].project(y, x[rows], bias)
            if not isinstance(rows, slice):
                logits[rows] = y

    def hide_added(self, logits: Tensor) -> None:
        """-inf in the place of added tokens, but those of the adapter of each row. logits `[T,
        tokens]`: of the rows that were announced, with those of all ranks, the last `extra_tokens`
        of them added."""
        added = logits[:, logits.shape[1] - self.extra_tokens :]
        kept = []
        for slot in dict.fromkeys(run.slot for run in self._logits_runs):
            if slot in self._answered:
                rows = run_rows(self._logits_runs, slot, len(logits), logits.device)
                kept.append((rows, self._answered[slot], added[rows][:, self._answered[slot]]))
        added.fill_(-torch.inf)
        for rows, ids, values in kept:
            y = added[rows]
            y[:, ids] = values
            if not isinstance(rows, slice):
                added[rows] = y
