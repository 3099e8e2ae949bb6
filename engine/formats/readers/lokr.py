"""LoKr (LyCORIS, arXiv 2309.14859) as PEFT writes it: a Kronecker product.

Keys: `{linear}.lokr_w1` [l, m], or `.lokr_w1_a` [l, r] and `.lokr_w1_b` [r, m]; `.lokr_w2` [k, n],
or `.lokr_w2_a` [k, r] and `.lokr_w2_b` [r, n]; the linear is of l k outputs and m n inputs.
With w1 = P1 Q1 and w2 = P2 Q2, w1 (x) w2 = (P1 (x) P2) (Q1 (x) Q2): one pair, whose rank is the
product of theirs. A whole w is itself times the identity.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from molehill.engine.adapter.errors import MissingTensorError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.formats.readers.tuner_linears import TunedLinears

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    tuned = tuner_linears.find(files.config, files.weights, "lokr", _PARTS)
    sites = tuner_linears.plain(_pairs(files, tuned), files.limits)
    return Adapter("lokr", sites, files.config.text("base_model_name_or_path"), tuned.warnings)


READER = Reader(PEFT_FILES, read, peft_types=("LOKR",), expands=True)


def _pairs(files: AdapterFiles, tuned: TunedLinears) -> Iterator[tuple[str, Tensor, Tensor]]:
    scalings = tuner_linears.scalings(files.config, tuned)
    for site, stem in tuned.stems.items():
        rank, factor = scalings[site]
        (p1, q1), (p2, q2) = (
            _factor(files.weights, f"{stem}.lokr_{name}", rank) for name in ("w1", "w2")
        )
        ranks = p1.shape[1], p2.shape[1]
        why = f"the product of its two factors' {ranks[0]} and {ranks[1]}"
        where = files.weights.where(f"{stem}.lokr_w1")
        tuner_linears.check_rank(where, ranks[0] * ranks[1], why, files.limits)
        yield site, torch.kron(q1, q2), torch.kron(p1, p2) * factor


def _factor(weights: Weights, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """P and Q of one factor P Q, with as few columns of P as there can be."""
    if name in weights.tensors:
        for half in (f"{name}_a", f"{name}_b"):
            if half in weights.tensors:
                raise ShapeError(weights.where(half), f"a part beside {name}", "one of the two")
        whole = weights.tensor(name, 2)
        rows, columns = whole.shape
        if rows < columns:
            return torch.eye(rows), whole
        return whole, torch.eye(columns)
    if f"{name}_a" not in weights.tensors:
        expected = f"one, or {name}_a and {name}_b"
        raise MissingTensorError(weights.where(name), "no such tensor", expected)
    p, q = weights.tensor(f"{name}_a", 2), weights.tensor(f"{name}_b", 2)
    for half, size in (("a", p.shape[1]), ("b", q.shape[0])):
        if size != rank:
            where = weights.where(f"{name}_{half}")
            raise ShapeError(where, f"rank {size}", f"the config's rank {rank}")
    return p, q
