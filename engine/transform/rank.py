"""Whether a low-rank pair has full numerical rank, without factorising it."""

import math

import torch
from torch import Tensor

# Columns of A and rows of B, for each rank row, that are looked at before all of them are.
SAMPLED = 4


def surely_full(a: Tensor, b: Tensor, threshold: float) -> bool:
    """Whether every singular value of B A is above `threshold` of the largest.

    a: `[R, in]`. b: `[out, R]`. False also where the bound used does not tell: sigma_R(B A) is at
    least sigma_R(A) sigma_R(B), and sigma_1(B A) at most the product of the Frobenius norms.
    Of pairs whose condition is far from the limit a few columns of A and rows of B tell enough, for
    further ones only add to the smallest singular values.
    """
    rank, whole = len(a), max(a.shape[1], len(b))
    if not 0 < rank <= min(a.shape[1], len(b)):
        return False
    limit = threshold * _norm(a) * _norm(b)
    for width in sorted({min(SAMPLED * rank, whole), whole}):
        if _least(a[:, :width]) * _least(b[:width].T) > limit:
            return True
    return False


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _least(rows: Tensor) -> float:
    """A lower bound of the smallest singular value of `[R, n]` with R <= n, 0 if there is none.

    From the eigenvalues of rows rows^T in float64, less what rounding may have added to them: n eps
    times the trace for the sums, R eps times it for the eigenvalues.
    """
    wide = rows.double()
    gram = wide @ wide.T
    rounding = sum(wide.shape) * torch.finfo(torch.float64).eps * float(gram.trace())
    least = float(torch.linalg.eigvalsh(gram)[0]) - rounding
    return math.sqrt(max(least, 0.0))
