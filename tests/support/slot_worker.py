"""A slot table with the backend and cache of a worker."""

import torch

from molehill.engine.routing_stats import cost_table
from molehill.engine.vllm.host_cache import PreparedAdapter
from molehill.engine.vllm.rank_agreement import RankAgreement
from molehill.engine.vllm.slot_table import SlotTable
from molehill.kernels.interface import LinearPiece, LinearShape, SlotWeights
from molehill.kernels.mixture import Experts
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.policy import Constant
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.vocabulary import Vocabulary

IN, OUT, RANK = 8, 6, 2

BYTES = 4 * RANK * (IN + OUT)


class Worker:
    """A linear, and slots with memory for two adapters."""

    def __init__(self, ranks: RankAgreement | None = None) -> None:
        self.backend = TorchBackend()
        self.handle = self.backend.register_linear(LinearShape("q", IN, OUT))
        ranks = ranks or RankAgreement(1, None)
        self.slots = SlotTable(self.backend, MoeBlocks(), Vocabulary(), 2 * BYTES, ranks)

    def adapter(self, rank: int = RANK) -> PreparedAdapter:
        pair = Experts(torch.randn(rank, IN), torch.randn(OUT, rank), (rank,))
        piece = LinearPiece("layers.0.self_attn.q_proj", 0, pair, Constant((1.0,)), None)
        weights = SlotWeights({self.handle: [piece]}, {})
        num_bytes = weights.num_bytes(torch.float32)
        return PreparedAdapter(cost_table(()), {}, num_bytes, weights.is_empty, weights)

    def nothing(self) -> PreparedAdapter:
        return PreparedAdapter(cost_table(()), {}, 0, True, SlotWeights({}, {}))
