"""What one adapter has on the embedding and on the LM head of a base, cut to a rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.kernels.mixture import Experts, VocabularyRows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class VocabularyShape:
    """The embedding or the LM head of the base model, as this rank sees it. tokens: of this rank's
    part of the vocabulary, without padding."""

    tokens: int
    hidden: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU


@dataclass(frozen=True)
class VocabularyPiece:
    """What is on the embedding or on the LM head, cut to this rank's tokens.

    pair: on the embedding A `[r, tokens]` and B `[hidden, r]`, on the head A `[r, hidden]` and
    B `[tokens, r]`. rows: in the place of the base's, their ids counted from this rank's first.
    """

    site: str
    pair: Experts | None
    rows: VocabularyRows | None = None


@dataclass(frozen=True)
class VocabularyPieces:
    """What one adapter has on the vocabulary.

    answered: int64 `[n]`, the added tokens that its answers may have, on every rank all of them;
    counted from the first id that the base does not have. None for none.
    """

    embedding: VocabularyPiece | None = None
    head: VocabularyPiece | None = None
    answered: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.embedding is None and self.head is None
