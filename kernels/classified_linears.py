"""Experts whose gate weights a classifier gave (X-LoRA), in torch, for every backend.

Gate weights of a token come from the base's last hidden state of that token, so the base runs
before. Rows that have none yet are the base's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels import custom_ops
from molehill.kernels.checks import check_classified
from molehill.kernels.classifier import Classifier, ClassifierPiece, ClassifierPieces
from molehill.kernels.interface import LinearShape, Run
from molehill.kernels.run_rows import Rows, run_rows


class ClassifiedTable:
    """One adapter's experts on one projection. A and B are kept in the activations' dtype."""

    def __init__(self, piece: ClassifierPiece, shape: LinearShape) -> None:
        self._a = piece.experts.a.to(shape.device, shape.dtype).contiguous()
        self._b = piece.experts.b.to(shape.device, shape.dtype).contiguous()
        self._expert_of_row = piece.experts.expert_of_row.to(shape.device)
        self._columns = slice(piece.start, piece.start + len(self._b))
        self._place = piece.place

    @property
    def num_bytes(self) -> int:
        return self._a.nbytes + self._b.nbytes

    def add(self, y: Tensor, x: Tensor, gate_weights: Tensor) -> None:
        """Changes `y [T, out]` in place, of x `[T, in]` and gate weights `[T, places or 1, E]`."""
        place = self._place if gate_weights.shape[1] > 1 else 0
        z = F.linear(x, self._a) * gate_weights[:, place][:, self._expert_of_row]
        y[:, self._columns] += F.linear(z.to(x.dtype), self._b)


@dataclass(frozen=True)
class ClassifiedSlot:
    """One adapter. tables: by a linear's handle."""

    classifier: Classifier
    tables: Mapping[int, Sequence[ClassifiedTable]]

    @property
    def num_bytes(self) -> int:
        classifier = sum(tensor.nbytes for _, tensor in self.classifier.tensors())
        tables = (table for tables in self.tables.values() for table in tables)
        return classifier + sum(table.num_bytes for table in tables)


class ClassifiedLinears:
    """All linears of one worker, and what the slots with a classifier do to them.

    `op(out, x, handle)` is what a model's forward calls after a linear's other mixtures, the handle
    as a one-element int64 CPU tensor. hidden: the base's hidden width.
    """

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden
        self._shapes: dict[int, LinearShape] = {}
        self._slots: dict[int, ClassifiedSlot] = {}
        self._runs: list[Run] = []
        # Of the rows of a slot, in their order.
        self._gate_weights: dict[int, Tensor] = {}
        self.op = torch.ops.molehill.classified.default
        custom_ops.install_classified(self.add)

    def register(self, handle: int, shape: LinearShape) -> None:
        """A linear by the backend's handle; before any weights are stored."""
        self._shapes[handle] = shape

    def store(self, slot: int, pieces: ClassifierPieces | None) -> None:
        """Puts what an adapter has here into an empty slot; on error the slot stays empty.

        Raises WeightsError, MemoryError.
        """
        if pieces is None:
            return
        check_classified(pieces, self._shapes, self._hidden)
        tables = {
            handle: [ClassifiedTable(piece, self._shapes[handle]) for piece in linear]
            for handle, linear in pieces.linears.items()
        }
        device = next(iter(self._shapes.values())).device
        self._slots[slot] = ClassifiedSlot(pieces.classifier.to(device), tables)

    def erase(self, slot: int) -> None:
        """Frees a slot."""
        self._slots.pop(slot, None)

    def resident_bytes(self, slot: int) -> int:
        """Bytes that the slot's serving copy takes."""
        return self._slots[slot].num_bytes if slot in self._slots else 0

    def has_classifier(self, slot: int) -> bool:
        """Whether the slot's gate weights come from one."""
        return slot in self._slots

    def classifier(self, slot: int) -> Classifier | None:
        """The slot's, if it has one."""
        return self._slots[slot].classifier if slot in self._slots else None

    def begin_pass(self, runs: Sequence[Run]) -> None:
        """Announces a pass that makes hidden states, whose rows with a classifier are these."""
        self._runs = [run for run in runs if run.slot in self._slots]
        self._gate_weights = {}
        for slot in dict.fromkeys(run.slot for run in self._runs):
            rows = sum(run.stop - run.start for run in self._runs if run.slot == slot)
            weights = self._slots[slot].classifier.first_gate_weights(rows)
            if weights is not None:
                self._gate_weights[slot] = weights

    def classify(self, hidden: Tensor) -> None:
        """Gate weights for the next forward of the announced rows, from hidden states
        `[T, hidden]`."""
        self._gate_weights = {
            slot: self._slots[slot].classifier.gate_weights(hidden[self._rows(slot, hidden)])
            for slot in dict.fromkeys(run.slot for run in self._runs)
        }

    def begin_without_pass(self, runs: Sequence[Run]) -> None:
        """Announces a forward of which every row with a classifier gets its gate weights by
        `give`."""
        self._runs = [run for run in runs if run.slot in self._slots]
        self._gate_weights = {}
        for slot in dict.fromkeys(run.slot for run in self._runs):
            classifier = self._slots[slot].classifier
            rows = sum(run.stop - run.start for run in self._runs if run.slot == slot)
            places = classifier.places if classifier.layerwise else 1
            like = classifier.layers[0][0]
            self._gate_weights[slot] = like.new_zeros(rows, places, classifier.experts)

    def gate_weights(self, slot: int, row: int) -> Tensor:
        """Of one row of the step, which is the slot's: a copy, `[places or 1, E]`."""
        return self._gate_weights[slot][self._place(slot, row)].clone()

    def give(self, slot: int, start: int, stop: int, gate_weights: Tensor) -> None:
        """Rows of the step, all in one run of the slot's, get these `[places or 1, E]`."""
        first = self._place(slot, start)
        self._gate_weights[slot][first : first + stop - start] = gate_weights

    def _place(self, slot: int, row: int) -> int:
        """Of a row of the step among the slot's."""
        before = 0
        for run in self._runs:
            if run.slot == slot and run.start <= row < run.stop:
                return before + row - run.start
            before += (run.stop - run.start) * (run.slot == slot)
        raise IndexError(f"row {row} is none of slot {slot}")

    def end_step(self) -> None:
        """No row has gate weights any more."""
        self._runs, self._gate_weights = [], {}

    def add(self, out: Tensor, x: Tensor, handle: int) -> None:
        """Changes the `out [T, out]` that a linear made of x `[T, in]`."""
        for slot, weights in self._gate_weights.items():
            tables = self._slots[slot].tables.get(handle)
            if not tables:
                continue
            rows = self._rows(slot, x)
            y, read = out[rows], x[rows]
            for table in tables:
                table.add(y, read, weights)
            if not isinstance(rows, slice):
                out[rows] = y

    def _rows(self, slot: int, x: Tensor) -> Rows:
        return run_rows(self._runs, slot, len(x), x.device)
