"""VeRA (arXiv 2310.11454) as PEFT writes it: random projections shared by all, two vectors each.

Keys: `base_model.vera_A` [r, most in], `base_model.vera_B` [most out, r], and by linear
`.vera_lambda_d` [r], `.vera_lambda_b` [out]. A linear uses the first `in` columns of A and the
first `out` rows of B: y = W x + b * B (d * A x). How wide an input is, the file does not say.
With `save_projection` false A and B are left out, for they are drawn from `projection_prng_key`:
uniform in +-sqrt(6 / fan in), A before B, of the greatest widths among the adapted linears.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import LimitError, MissingTensorError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.formats.readers.tuner_linears import TunedLinears

_PARTS = ("vera_lambda_b", "vera_lambda_d")
_A, _B = "base_model.vera_A", "base_model.vera_B"
_MISSING = "how wide a linear's input is"


@dataclass(frozen=True)
class _Projections:
    """a: `[r, most in]`, b: `[most out, r]`."""

    a: Tensor
    b: Tensor
    seeded: bool


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    pairs = {name: tensor for name, tensor in weights.tensors.items() if name not in (_A, _B)}
    tuned = tuner_linears.find(config, Weights(weights.file, pairs), "vera", _PARTS)
    shapes = {site: tuner_linears.base_shape(files, site, _MISSING) for site in tuned.stems}
    shared = _projections(files, list(shapes.values()))
    sites = tuner_linears.plain(_pairs(weights, tuned, shapes, shared), files.limits)
    notes = tuned.warnings
    if shared.seeded:
        notes += ("the projections are not in the file: drawn anew, as PEFT does on loading",)
    base = config.text("base_model_name_or_path")
    return Adapter("vera", sites, base, notes, biases=tuned.biases)


READER = Reader(PEFT_FILES, read, peft_types=("VERA",), expands=True)


def _projections(files: AdapterFiles, shapes: list[tuple[int, int]]) -> _Projections:
    """Those of the file, or drawn anew. shapes: (in, out) of all linears."""
    config, weights = files.config, files.weights
    rank = config.integer("r")
    if _A in weights.tensors or _B in weights.tensors:
        a, b = weights.tensor(_A, 2), weights.tensor(_B, 2)
        for name, size in ((_A, a.shape[0]), (_B, b.shape[1])):
            if size != rank:
                raise ShapeError(weights.where(name), f"rank {size}", f"the config's rank {rank}")
        return _Projections(a, b, seeded=False)
    if config.flag("save_projection", True):
        expected = "one, as save_projection is not false"
        raise MissingTensorError(weights.where(_A), "no such tensor", expected)
    inputs, outputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    if 4 * rank * (inputs + outputs) > files.limits.adapter_bytes:
        expected = f"at most {files.limits.adapter_bytes} bytes"
        raise LimitError(f"{config.where}: r", f"projections of rank {rank}", expected)
    generator = torch.Generator().manual_seed(_key(config))
    return _Projections(
        _drawn((rank, inputs), generator), _drawn((outputs, rank), generator), seeded=True
    )


def _key(config: Fields) -> int:
    value = config.values.get("projection_prng_key", 0)
    if type(value) is not int or not -(2**63) <= value < 2**64:
        raise config.error("projection_prng_key", "a whole number of 64 bits")
    return value


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform distribution of gain sqrt(2), float32."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _pairs(
    weights: Weights,
    tuned: TunedLinears,
    shapes: dict[str, tuple[int, int]],
    shared: _Projections,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    rank = shared.a.shape[0]
    for site, stem in tuned.stems.items():
        inputs, outputs = shapes[site]
        d_name, b_name = f"{stem}.vera_lambda_d", f"{stem}.vera_lambda_b"
        d, b = weights.tensor(d_name, 1), weights.tensor(b_name, 1)
        for name, vector, length in ((d_name, d, rank), (b_name, b, outputs)):
            if vector.shape[0] != length:
                raise ShapeError(weights.where(name), list(vector.shape), [length])
        for name, widest, needed in (
            (_A, shared.a.shape[1], inputs),
            (_B, shared.b.shape[0], outputs),
        ):
            if widest < needed:
                expected = f"at least {needed}, as {site} has"
                raise ShapeError(weights.where(name), f"width {widest}", expected)
        yield site, d[:, None] * shared.a[:, :inputs], b[:, None] * shared.b[:outputs]
