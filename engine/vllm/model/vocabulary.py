"""The embedding and the LM head of a loaded vLLM model: which of them adapters can change, and how
they are hooked and an adapter is cut to this rank.

The seam is the quant method of either, before the tensor-parallel sum of the lookup and before the
logits are gathered: each rank has a part of the vocabulary. A tied base may have one module for
both.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head
from molehill.engine.vllm.model.discovery import named_modules
from molehill.kernels.interface import Backend
from molehill.kernels.mixture import Experts, LinearMixture, Mixture, VocabularyRows
from molehill.kernels.vocabulary import Vocabulary
from molehill.kernels.vocabulary_pieces import VocabularyPiece, VocabularyPieces, VocabularyShape

# Speculation whose drafts come from no model, which could share the base's embedding.
_WITHOUT_MODEL = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class Site:
    """The embedding or the head. tokens, hidden: of the whole model, with added tokens. part: this
    rank's range of the tokens."""

    name: str
    module: VocabParallelEmbedding
    tokens: int
    hidden: int
    part: range

    def shape(self, extra_tokens: int) -> tuple[int, int]:
        """(in, out), the embedding taken as a linear, without as many tokens at the end."""
        tokens = self.tokens - extra_tokens
        return (tokens, self.hidden) if is_embedding(self.name) else (self.hidden, tokens)


def find_embedding(model: nn.Module) -> Site | None:
    """On the first pipeline stage; None if it is none that adapters can change."""
    embeddings = [
        (name, module)
        for name, module in named_modules(model)
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and is_embedding(name)
    ]
    if len(embeddings) != 1 or not get_pp_group().is_first_rank:
        return None
    return _site(*embeddings[0])


def find_head(model: nn.Module, tied: bool) -> Site | None:
    """On the last pipeline stage; None if there is none. tied: whether the base says so."""
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if len(processors) != 1 or not get_pp_group().is_last_rank:
        return None
    vocabulary = [
        (name, module)
        for name, module in named_modules(model)
        if isinstance(module, VocabParallelEmbedding)
    ]
    heads = [module for name, module in vocabulary if is_head(name)]
    if not heads and tied:
        heads = [module for name, module in vocabulary if is_embedding(name)]
    return _site("lm_head", heads[0]) if len(heads) == 1 else None


def _site(name: str, module: VocabParallelEmbedding) -> Site:
    shard = module.shard_indices
    part = range(shard.org_vocab_start_index, shard.org_vocab_end_index)
    return Site(name, module, module.org_vocab_size, module.embedding_dim, part)


def embedding_refusal(config: VllmConfig, cuda_graphs: bool) -> str | None:
    """Why adapters cannot change the embedding; None if they can."""
    return _refusal(
        {
            "CUDA graphs (start with --enforce-eager)": cuda_graphs,
            "a multimodal base, whose text is looked up by itself": (
                config.model_config.is_multimodal_model
            ),
            "prompts of embeddings (--enable-prompt-embeds)": (
                config.model_config.enable_prompt_embeds
            ),
            "a draft model, which may share the embedding": draft_model(config),
        }
    )


def draft_model(config: VllmConfig) -> bool:
    """Whether a model speculates, and not a method without one."""
    drafts = config.speculative_config
    return drafts is not None and drafts.method not in _WITHOUT_MODEL


def by_token_refusal(
    config: VllmConfig, model: nn.Module, backend: Backend, cuda_graphs: bool
) -> str | None:
    """Why no adapter can go by the ids of tokens, which are read as the model is called; None if
    one can."""
    bounded = f"the {backend.name} backend, whose steps have few slots"
    return embedding_refusal(config, cuda_graphs) or _refusal(
        {
            "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
            # Each adapter that a token may have takes one of them.
            f"{bounded} (start with --adapter-backend torch)": (
                backend.most_slots_per_step is not None
            ),
            # Its call goes round hooks.
            "a model that is compiled whole": type(model).__call__ is not nn.Module.__call__,
        }
    )


def head_refusal(config: VllmConfig) -> str | None:
    """Why adapters cannot change the LM head; None if they can."""
    model = config.model_config
    sharded = getattr(config.parallel_config, "enable_batch_sharded_sampling", False)
    return _refusal(
        {
            f"a head in {model.head_dtype} (head_dtype)": model.head_dtype != model.dtype,
            "batch-sharded sampling": bool(sharded),
        }
    )


def _refusal(reasons: Mapping[str, bool]) -> str | None:
    return next((f"{reason} on this server" for reason, holds in reasons.items() if holds), None)


def register(
    vocabulary: Vocabulary,
    embedding: Site | None,
    head: Site | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Makes the sites known and hooks them."""
    if embedding is not None:
        shape = VocabularyShape(len(embedding.part), embedding.hidden, dtype, device)
        vocabulary.register_embedding(shape)
        _hook(embedding.module)
        embedding.module.molehill_embedding_op = vocabulary.embedding_op
        # Goes round the quant method.
        embedding.module.use_fused_embedding = False
    if head is not None:
        shape = VocabularyShape(len(head.part), head.hidden, dtype, device)
        vocabulary.register_head(shape)
        _hook(head.module)
        head.module.molehill_project = vocabulary.project


@cache
def _hooked(method: Hashable) -> type:
    """A subclass of a quant method whose lookup and GEMM also apply the adapters."""
    parent: Any = method

    def embedding(self: Any, layer: Any, input_: Tensor) -> Tensor:
        out: Tensor = parent.embedding(self, layer, input_)
        if layer.molehill_embedding_op is not None:
            layer.molehill_embedding_op(out.flatten(0, -2), input_.flatten())
        return out

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits: Tensor = parent.apply(self, layer, x, bias)
        if layer.molehill_project is not None:
            layer.molehill_project(logits.flatten(0, -2), x.flatten(0, -2), bias)
        return logits

    return type(f"Molehill{parent.__name__}", (parent,), {"embedding": embedding, "apply": apply})


def _hook(module: Any) -> None:
    if hasattr(module, "molehill_project"):
        return
    method = module.quant_method
    kind: Any = type(method)
    hooked: Any = object.__new__(_hooked(kind))
    hooked.__dict__ = method.__dict__
    module.molehill_embedding_op = None
    module.molehill_project = None
    module.quant_method = hooked


def cut(
    adapter: Adapter, embedding: Site | None, head: Site | None, added: AddedTokens
) -> VocabularyPieces:
    """This rank's share of what an adapter has on the vocabulary. added: its tokens that the base
    lacks."""
    answered = None
    if head is not None and added.answered:
        answered = torch.tensor(added.answered) - added.first
    return VocabularyPieces(
        None if embedding is None else _cut(adapter, embedding, _cut_inputs),
        None if head is None else _cut(adapter, head, _cut_outputs),
        answered,
    )


def _cut(
    adapter: Adapter, site: Site, share: Callable[[Experts, range], Experts]
) -> VocabularyPiece | None:
    mixture, table = adapter.sites.get(site.name), adapter.rows.get(site.name)
    if mixture is None and table is None:
        return None
    pair = None if mixture is None else share(_pair(mixture), site.part)
    return VocabularyPiece(site.name, pair, None if table is None else _cut_rows(table, site.part))


def _pair(mixture: Mixture) -> Experts:
    """The one pair of a static mixture."""
    assert isinstance(mixture, LinearMixture)
    constant, experts = mixture.policy.constant_weights, mixture.experts
    assert constant is not None
    b = experts.b * torch.tensor(constant)[experts.expert_of_row]
    return Experts(experts.a, b, (sum(experts.ranks),))


def _cut_rows(table: VocabularyRows, part: range) -> VocabularyRows:
    here = (table.ids >= part.start) & (table.ids < part.stop)
    return VocabularyRows(table.ids[here] - part.start, table.rows[here])


def _cut_inputs(pair: Experts, part: range) -> Experts:
    """Of tokens that it was not made for, zeros."""
    a = pair.a[:, part.start : part.stop]
    lacking = len(part) - a.shape[1]
    return Experts(F.pad(a, (0, lacking)) if lacking else a, pair.b, pair.ranks)


def _cut_outputs(pair: Experts, part: range) -> Experts:
    """Of tokens that it was not made for, zeros."""
    b = pair.b[part.start : part.stop]
    lacking = len(part) - len(b)
    return Experts(pair.a, F.pad(b, (0, 0, 0, lacking)) if lacking else b, pair.ranks)
