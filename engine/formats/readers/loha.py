"""LoHa (FedPara, arXiv 2108.06098) as PEFT writes it: an element-wise product of two pairs.

Keys: `{linear}.hada_w1_a` [out, r], `.hada_w1_b` [r, in], `.hada_w2_a` [out, r], `.hada_w2_b`
[r, in]. The delta alpha / r * (w1_a w1_b) * (w2_a w2_b) is one product of rank r^2: its columns of
B are all products of a column of w1_a and one of w2_a, its rows of A those of rows of w1_b and
w2_b (Khatri-Rao).
"""

from collections.abc import Iterator

from torch import Tensor

from molehill.engine.adapter.errors import ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.formats.readers.tuner_linears import TunedLinears

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    tuned = tuner_linears.find(files.config, files.weights, "loha", _PARTS)
    sites = tuner_linears.plain(_pairs(files, tuned), files.limits)
    return Adapter("loha", sites, files.config.text("base_model_name_or_path"), tuned.warnings)


READER = Reader(PEFT_FILES, read, peft_types=("LOHA",), expands=True)


def _pairs(files: AdapterFiles, tuned: TunedLinears) -> Iterator[tuple[str, Tensor, Tensor]]:
    scalings = tuner_linears.scalings(files.config, tuned)
    for site, stem in tuned.stems.items():
        rank, factor = scalings[site]
        outer, inner = _factors(files.weights, stem, rank)
        why = f"the product of LoHa's two ranks of {rank}"
        where = files.weights.where(f"{stem}.hada_w1_a")
        tuner_linears.check_rank(where, rank * rank, why, files.limits)
        b = (outer[0][:, :, None] * outer[1][:, None, :]).flatten(1)
        a = (inner[0][:, None, :] * inner[1][None, :, :]).flatten(0, 1)
        yield site, a, b * factor


def _factors(weights: Weights, stem: str, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """(w1_a, w2_a) and (w1_b, w2_b)."""
    outer, inner = (
        [weights.tensor(f"{stem}.hada_w{number}_{half}", 2) for number in (1, 2)] for half in "ab"
    )
    for half, pair, axis in (("a", outer, 1), ("b", inner, 0)):
        for number, tensor in enumerate(pair, 1):
            where = weights.where(f"{stem}.hada_w{number}_{half}")
            if tensor.shape[axis] != rank:
                found = f"rank {tensor.shape[axis]}"
                raise ShapeError(where, found, f"the config's rank {rank}")
            if tensor.shape != pair[0].shape:
                raise ShapeError(where, list(tensor.shape), list(pair[0].shape))
    return outer, inner
