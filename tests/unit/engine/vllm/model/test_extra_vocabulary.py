"""Room after a checkpoint's vocabulary, and an adapter's share of it on a rank."""

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.adapter.model import Adapter
from molehill.engine.vllm.model.extra_vocabulary import with_extra_tokens
from molehill.engine.vllm.model.vocabulary import Site, cut
from molehill.kernels.mixture import Experts, LinearMixture, VocabularyRows
from molehill.kernels.policy import Constant

TOKENS, EXTRA, HIDDEN = 6, 3, 2


def grown(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(with_extra_tokens(TOKENS, EXTRA, iter(checkpoint.items()), torch.float32))


def test_rows_of_zeros_follow_those_of_the_checkpoint() -> None:
    checkpoint = {
        "model.embed_tokens.weight": torch.randn(TOKENS, HIDDEN),
        "model.layers.0.q_proj.weight": torch.randn(TOKENS, HIDDEN),
        "lm_head.weight": torch.randn(TOKENS, HIDDEN).bfloat16(),
        "lm_head.bias": torch.randn(TOKENS),
    }
    result = grown(checkpoint)
    for name, tensor in checkpoint.items():
        added = 0 if "layers" in name else EXTRA
        assert len(result[name]) == TOKENS + added
        assert torch.equal(result[name][:TOKENS], tensor)
        assert not result[name][TOKENS:].any()
        assert result[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            {"model.embed_tokens.weight": torch.ones(5, 2)},
            r"tokens\.weight: found .*\[5, 2\]",
        ),
        ({"lm_head.qweight": torch.ones(6, 2, dtype=torch.int32)}, r"lm_head\.qweight: found"),
        ({"model.words.weight": torch.ones(6, 2)}, "no embedding and no LM head"),
    ],
)
def test_another_checkpoint_has_no_room(checkpoint: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        grown(checkpoint)


def site(name: str, part: range) -> Site:
    module = nn.Module.__new__(VocabParallelEmbedding)
    return Site(name, module, TOKENS + EXTRA, HIDDEN, part)


def test_each_rank_has_its_part_of_a_pair_and_all_of_what_is_answered() -> None:
    """A pair for fewer tokens than there is room for has zeros for the others."""
    a, b = torch.randn(1, TOKENS + 2), torch.randn(TOKENS + 2, 1)
    constant = Constant((1.0,))
    sites = {
        "embed_tokens": LinearMixture(Experts(a, torch.ones(HIDDEN, 1), (1,)), constant),
        "lm_head": LinearMixture(Experts(torch.ones(1, HIDDEN), b, (1,)), constant),
    }
    ids = torch.tensor([6, 7])
    table = VocabularyRows(ids, torch.randn(2, HIDDEN))
    adapter = Adapter("lora", sites, rows={"embed_tokens": table, "lm_head": table})
    added = AddedTokens(TOKENS, (6, 7), (6, 7))
    wide_a, wide_b = torch.zeros(1, TOKENS + EXTRA), torch.zeros(TOKENS + EXTRA, 1)
    wide_a[:, : TOKENS + 2], wide_b[: TOKENS + 2] = a, b
    for part, here in ((range(5), []), (range(5, 9), [1, 2])):
        pieces = cut(adapter, site("embed_tokens", part), site("lm_head", part), added)
        assert pieces.embedding is not None
        assert pieces.head is not None
        for piece in (pieces.embedding, pieces.head):
            assert piece.pair is not None
            assert piece.rows is not None
            assert piece.rows.ids.tolist() == here
        assert torch.equal(pieces.embedding.pair.a, wide_a[:, part.start : part.stop])
        assert torch.equal(pieces.head.pair.b, wide_b[part.start : part.stop])
        assert pieces.answered is not None
        assert pieces.answered.tolist() == [0, 1]
