"""LoRA on the experts of MoE blocks against the definition, token by token."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from molehill.kernels.interface import UNSERVED, MoePiece, MoeShape, Run
from molehill.kernels.mixture import Experts
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.reference import moe_experts

HIDDEN, INNER, EXPERTS, TOP_K = 24, 40, 5, 2
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
RANKS = (3, 0, 1, 8, 2)


@dataclass
class Base:
    """A block's weights, and a kernel of its own that says which rows it was given."""

    dtype: torch.dtype
    ran: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN).to(self.dtype) / 5
        self.w2 = torch.randn(EXPERTS, HIDDEN, INNER).to(self.dtype) / 6

    def gate_up(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x @ self.w13[expert].T).chunk(2, dim=1)
        return gate, up

    def down(self, expert: int, h: Tensor) -> Tensor:
        return h @ self.w2[expert].T

    def run(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        self.ran.append(len(x))
        return self.expected(x, weights, chosen, {}).to(x.dtype)

    def expected(self, x: Tensor, weights: Tensor, chosen: Tensor, deltas) -> Tensor:
        return moe_experts(x, weights, chosen, self.w13, self.w2, "silu", deltas)


def stack(inputs: int, outputs: int, ranks=RANKS, seed: int = 2) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(ranks)
    a = torch.randn(rows, inputs, generator=generator) / inputs**0.5
    return Experts(a, torch.randn(outputs, rows, generator=generator) / 2, tuple(ranks))


def piece(seed: int = 2) -> MoePiece:
    return MoePiece(
        "layers.0.mlp",
        gate=stack(HIDDEN, INNER, seed=seed),
        up=stack(HIDDEN, INNER, (0, 2, 2, 0, 4), seed=seed + 1),
        down=stack(INNER, HIDDEN, seed=seed + 2),
    )


def deltas_of(moe_piece: MoePiece) -> dict[str, Experts]:
    named = {"gate_proj": moe_piece.gate, "up_proj": moe_piece.up, "down_proj": moe_piece.down}
    return {name: experts for name, experts in named.items() if experts is not None}


def batch(tokens: int, dtype: torch.dtype, top_k: int = TOP_K) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    weights, chosen = torch.randn(tokens, EXPERTS).softmax(-1).topk(top_k)
    return x, weights, chosen.int()


def blocks(base: Base) -> tuple[MoeBlocks, int]:
    made = MoeBlocks()
    shape = MoeShape("layers.0.mlp", EXPERTS, "silu", base.run, base, base.dtype)
    return made, made.register(shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_adapted_rows_are_the_definitions(dtype, tokens, top_k):
    base = Base(dtype)
    made, handle = blocks(base)
    made.store(0, {handle: piece()})
    made.begin_step([Run(0, 0, tokens)])
    x, weights, chosen = batch(tokens, dtype, top_k)
    expected = base.expected(x, weights, chosen, deltas_of(piece()))
    y = made.run(x, weights, chosen, handle)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert base.ran == []
    plain = base.expected(x, weights, chosen, {})
    assert (expected - plain).abs().max() > 10 * TOLERANCE[torch.float32]


def test_base_adapted_void_and_padding_rows_in_one_batch():
    base = Base(torch.float32)
    made, handle = blocks(base)
    made.store(0, {handle: piece(seed=2)})
    made.store(3, {handle: piece(seed=20)})
    made.store(4, {})
    runs = [Run(0, 0, 4), Run(4, 5, 7), Run(3, 7, 9), Run(UNSERVED, 9, 11), Run(0, 11, 12)]
    made.begin_step(runs)
    x, weights, chosen = batch(14, torch.float32)
    y = made.run(x, weights, chosen, handle)
    expected = base.expected(x, weights, chosen, {})
    for slot, seed in ((0, 2), (3, 20)):
        one_piece = base.expected(x, weights, chosen, deltas_of(piece(seed=seed)))
        for run in runs:
            if run.slot == slot:
                expected[run.start : run.stop] = one_piece[run.start : run.stop]
    expected[9:11] = 0
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE[torch.float32])
    assert base.ran == [5], "the base's kernel ran on other rows than those of base and padding"


def test_a_batch_without_adapted_rows_is_the_kernels_own():
    base = Base(torch.float32)
    made, handle = blocks(base)
    made.store(0, {handle: piece()})
    made.begin_step([])
    x, weights, chosen = batch(6, torch.float32)
    assert torch.equal(made.run(x, weights, chosen, handle), base.expected(x, weights, chosen, {}))
    assert base.ran == [6]


def test_projections_that_are_not_adapted_use_the_base_alone():
    base = Base(torch.float32)
    made, handle = blocks(base)
    one_piece = MoePiece("layers.0.mlp", None, None, stack(INNER, HIDDEN))
    made.store(0, {handle: one_piece})
    made.begin_step([Run(0, 0, 9)])
    x, weights, chosen = batch(9, torch.float32)
    expected = base.expected(x, weights, chosen, deltas_of(one_piece))
    y = made.run(x, weights, chosen, handle)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_erasing_frees_the_slot():
    base = Base(torch.float32)
    made, handle = blocks(base)
    made.store(0, {handle: piece()})
    rows = sum(RANKS) * 2 + 8
    assert made.resident_bytes(0) == 4 * rows * (HIDDEN + INNER)
    made.erase(0)
    assert made.resident_bytes(0) == 0
    made.begin_step([])
    x, weights, chosen = batch(3, torch.float32)
    made.run(x, weights, chosen, handle)
    assert base.ran == [3]


def test_the_op_calls_the_blocks_that_were_made_last():
    base = Base(torch.float32)
    made, handle = blocks(base)
    made.store(0, {handle: piece()})
    made.begin_step([Run(0, 0, 4)])
    x, weights, chosen = batch(4, torch.float32)
    compiled = torch.compile(
        lambda *args: torch.ops.molehill.experts(*args), backend="eager", fullgraph=True
    )
    expected = base.expected(x, weights, chosen, deltas_of(piece()))
    y = compiled(x, weights, chosen, torch.tensor([handle]))
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE[torch.float32])
