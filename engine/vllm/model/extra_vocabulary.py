"""Loads a base model with room for added tokens after its vocabulary (`--extra-vocab`).

vLLM sizes everything that goes by tokens after the config's `vocab_size`, which has the room; only
the checkpoint has rows of the base's own tokens alone.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import VllmConfig

from molehill.engine.adapter.module_names import canonical
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, HEADS, is_on_vocabulary
from molehill.engine.vllm.model import checkpoint_loader
from molehill.engine.vllm.model.vocabulary import draft_model

# Without a checkpoint, the model has random weights of all sizes.
_DUMMY = "dummy"


def install(config: VllmConfig, extra_tokens: int) -> None:
    """Makes this process load the base of `config` with zeros for `extra_tokens` tokens, which its
    config's `vocab_size` has already. Raises RuntimeError for a base that has no room for them."""
    if not extra_tokens:
        return
    model, load = config.model_config, config.load_config
    batch_sharded = getattr(config.parallel_config, "enable_batch_sharded_sampling", False)
    for refused, what in (
        (model.is_multimodal_model, "a multimodal base, whose text is looked up by itself"),
        (draft_model(config), "a draft model, which has a vocabulary of its own"),
        (batch_sharded, "batch-sharded sampling, which splits logits by request"),
        (
            load.load_format not in (*checkpoint_loader.FORMATS, _DUMMY),
            f"another load format than {checkpoint_loader.FORMATS}",
        ),
    ):
        if refused:
            raise RuntimeError(f"--extra-vocab: found {what}")
    if load.load_format != _DUMMY:
        tokens = model.get_vocab_size() - extra_tokens
        checkpoint_loader.add(config, partial(with_extra_tokens, tokens, extra_tokens))


def with_extra_tokens(
    tokens: int, extra: int, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """`weights` with rows of zeros for `extra` more tokens in the embedding and the LM head, which
    have `tokens`. Raises RuntimeError where they are not plain matrices of that many rows, and at
    the end where there are none."""
    seen = False
    for name, weight in weights:
        module, _, leaf = name.rpartition(".")
        if not is_on_vocabulary(canonical(module)):
            yield name, weight
            continue
        plain = leaf in ("weight", "bias") and weight.is_floating_point()
        if not plain or len(weight) != tokens:
            found = f"{weight.dtype} {list(weight.shape)}"
            expected = f"floating point and {tokens} rows, as the config has"
            raise RuntimeError(f"--extra-vocab: {name}: found {found}, expected {expected}")
        seen = True
        yield name, F.pad(weight, (0, 0, 0, extra) if weight.ndim == 2 else (0, extra))
    if not seen:
        names = ", ".join((*EMBEDDINGS, *HEADS))
        raise RuntimeError(f"--extra-vocab: found no embedding and no LM head, expected {names}")
