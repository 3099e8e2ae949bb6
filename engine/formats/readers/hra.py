"""HRA (arXiv 2405.17484) as PEFT writes it: W times a product of Householder reflections.

Keys: `{linear}.hra_u` [in, r]. With its columns v_j at length 1,
H_1 ... H_r = I - V T V^T (compact WY form, Schreiber and Van Loan 1989): T is upper triangular,
T_jj = 2, and its column j above that is -2 T V^T v_j of the columns before. With `apply_GS` the
columns are made orthogonal first, and T = 2 I.
"""

import torch
from torch import Tensor

from molehill.engine.adapter.errors import NonFiniteError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import Reflection

_PARTS = ("hra_u",)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    rank, orthogonal = config.integer("r"), config.flag("apply_GS")
    tuned = tuner_linears.find(config, weights, "hra", _PARTS)
    sites = {
        site: reflection(_directions(weights, f"{stem}.hra_u", rank), orthogonal)
        for site, stem in tuned.stems.items()
    }
    base = config.text("base_model_name_or_path")
    return Adapter("hra", sites, base, tuned.warnings, biases=tuned.biases)


READER = Reader(PEFT_FILES, read, peft_types=("HRA",), expands=True)


def _directions(weights: Weights, name: str, rank: int) -> Tensor:
    u = weights.tensor(name, 2)
    if u.shape[1] != rank:
        raise ShapeError(weights.where(name), f"rank {u.shape[1]}", f"the config's rank {rank}")
    if not bool((u != 0).any(dim=0).all()):
        raise NonFiniteError(weights.where(name), "a column of zeros", "columns with a direction")
    return u


def reflection(u: Tensor, orthogonal: bool) -> Reflection:
    """H_1 ... H_r of the columns of u `[in, r]`; orthogonal: of u made so by Gram-Schmidt."""
    v = u.double()
    v = _gram_schmidt(v) if orthogonal else v / v.norm(dim=0)
    rank = v.shape[1]
    t = 2 * torch.eye(rank, dtype=torch.float64)
    if not orthogonal:
        products = v.T @ v
        for j in range(1, rank):
            t[:j, j] = -2 * t[:j, :j] @ products[:j, j]
    return Reflection(v.T.float().contiguous(), (v @ t).float().contiguous())


def _gram_schmidt(v: Tensor) -> Tensor:
    """Q of v = Q R up to signs, which I - 2 Q Q^T does not see."""
    orthonormal: Tensor = torch.linalg.qr(v).Q
    return orthonormal
