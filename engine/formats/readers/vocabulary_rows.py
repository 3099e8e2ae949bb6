"""Rows of the embedding and of the LM head that a file of PEFT's has in the place of the base's."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from molehill.engine.adapter.added_tokens import no_room
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.base_weights import vocabulary_tensor
from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.module_names import canonical
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers.vocabulary_tensors import (
    ROWS_OF_TOKENS,
    UNDER_PAIR,
    UNDER_ROWS,
    WHOLE,
    VocabularyTensors,
)
from molehill.kernels.mixture import VocabularyRows

_SAVED = "modules_to_save"
_INDICES = "trainable_token_indices"
# Rows compared at a time.
_ROWS = 1 << 14
# That a weight may have been saved in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_rows(
    config: Fields, weights: Weights, on_vocabulary: VocabularyTensors, base: BaseModel | None
) -> dict[str, VocabularyRows]:
    """The rows by site that are not the base's: of whole modules, which are compared with the
    base's, of added tokens, and of single tokens (`trainable_token_indices`), which go before.

    Raises an AdapterError.
    """
    tables = {}
    for module, key in on_vocabulary.having(WHOLE).items():
        site = canonical(module)
        _check_saved(config, weights, key, module, base)
        tables[site] = _rows_at(weights, key, changed_rows(weights, key, site, base))
    for part in (UNDER_PAIR, UNDER_ROWS):
        for module, key in on_vocabulary.having(part).items():
            site = canonical(module)
            tables[site] = _rows_at(weights, key, _added_rows(weights, key, site, base))
    for site, table in _rows_of_tokens(config, weights, on_vocabulary, base).items():
        tables[site] = _overlaid(tables[site], table) if site in tables else table
    return {site: table for site, table in tables.items() if len(table.ids)}


def _rows_at(weights: Weights, key: str, ids: Tensor) -> VocabularyRows:
    return VocabularyRows(ids, weights.tensors[key][ids])


def _overlaid(below: VocabularyRows, above: VocabularyRows) -> VocabularyRows:
    """The rows of both, of two for one token the second's."""
    kept = ~torch.isin(below.ids, above.ids)
    ids = torch.cat([below.ids[kept], above.ids])
    order = ids.argsort()
    return VocabularyRows(ids[order], torch.cat([below.rows[kept], above.rows])[order])


def _check_saved(
    config: Fields, weights: Weights, key: str, module: str, base: BaseModel | None
) -> None:
    """Raises UnsupportedError for a whole module that training did not change, nor added tokens to,
    and where there is no base to compare it with."""
    where, leaf = f"{config.where}: {_SAVED}", module.rpartition(".")[2]
    named = any(module == name or module.endswith(f".{name}") for name in config.texts(_SAVED))
    tied = config.flag("ensure_weight_tying") and bool(config.texts(_SAVED))
    if not named and not tied and not _is_grown(weights, key, module, base):
        expected = "the module among modules_to_save, or no tensors for it"
        found = f"a whole module that it does not name ({leaf})"
        raise UnsupportedError(where, found, expected)
    if base is None:
        expected = "no tensors for it, or the base model, to compare it with (--model, --base)"
        raise UnsupportedError(where, f"whole modules ({leaf})", expected)


def _is_grown(weights: Weights, key: str, module: str, base: BaseModel | None) -> bool:
    if base is None or canonical(module) not in base.vocabulary or base.num_tokens is None:
        return False
    return len(weights.tensor(key, 2)) > base.num_tokens


def _rows_of_tokens(
    config: Fields, weights: Weights, on_vocabulary: VocabularyTensors, base: BaseModel | None
) -> dict[str, VocabularyRows]:
    keys = on_vocabulary.having(ROWS_OF_TOKENS)
    indices = config.values.get(_INDICES)
    if not keys and indices in (None, [], {}):
        return {}
    where = f"{config.where}: {_INDICES}"
    if not keys or indices in (None, [], {}):
        expected = f"the field absent and no {ROWS_OF_TOKENS}, or both"
        raise UnsupportedError(where, "trained token embeddings", expected)
    if base is None:
        expected = "the base model, to know whether its head is tied (--model, --base)"
        raise UnsupportedError(where, "trained token embeddings", expected)
    tables = {}
    for module, key in keys.items():
        ids = _token_ids(config, indices, module, base.tied)
        rows = weights.tensor(key, 2)
        if len(rows) != len(ids):
            raise ShapeError(weights.where(key), list(rows.shape), [len(ids), rows.shape[1]])
        order = ids.argsort()
        tables[canonical(module)] = VocabularyRows(ids[order], rows[order])
    for site in [site for site in tables if is_embedding(site)]:
        heads = [name for name in base.vocabulary if is_head(name)]
        if base.tied and not any(head in tables for head in heads):
            # PEFT then has the tied head use the embedding's rows.
            tables |= dict.fromkeys(heads, tables[site])
    return tables


def _token_ids(config: Fields, indices: Any, module: str, tied: bool) -> Tensor:
    """int64, as the rows lie. tied: whether a head's may be the embedding's. Raises ConfigError."""
    if isinstance(indices, Mapping):
        names = [name for name in indices if module == name or module.endswith(f".{name}")]
        if not names and tied and is_head(canonical(module)):
            names = [name for name in indices if is_embedding(canonical(name))]
        indices = indices[names[0]] if len(names) == 1 else None
    if (
        not isinstance(indices, list)
        or not all(type(i) is int and 0 <= i < 1 << 24 for i in indices)
        or len(set(indices)) < len(indices)
    ):
        raise config.error(_INDICES, f"a list of token ids, each once, for {module}")
    return torch.tensor(indices, dtype=torch.int64)


def of_base(
    weights: Weights, key: str, site: str, base: BaseModel | None, part: Literal["weight", "bias"]
) -> Tensor:
    """The base's own weight, or its head's bias, that a whole one in the file stands for. Raises
    UnsupportedError."""
    if base is None:
        expected = "the base model, to compare it with (--model, --base)"
        raise UnsupportedError(weights.where(key), f"the whole {part} of {site}", expected)
    return vocabulary_tensor(base.source or base.name, site, base.tied, part)


def _added_rows(weights: Weights, key: str, site: str, base: BaseModel | None) -> Tensor:
    """The ids of added tokens of a weight that is the base's own but for them. Raises
    UnsupportedError, ShapeError."""
    changed = changed_rows(weights, key, site, base)
    assert base is not None
    assert base.num_tokens is not None
    others = int((changed < base.num_tokens).sum())
    if others:
        found = f"{others} rows that are not the base's"
        raise UnsupportedError(weights.where(key), found, "the base's own")
    return changed


def changed_rows(weights: Weights, key: str, site: str, base: BaseModel | None) -> Tensor:
    """The ids int64 `[n]` of the rows in which a whole weight of the file differs from the base's
    own, in the base's dtype and in those that it may have been saved in; of added tokens all.

    Raises UnsupportedError where there is no base to compare with or no room for added tokens,
    ShapeError.
    """
    saved = weights.tensor(key, 2)
    weight = of_base(weights, key, site, base, "weight")
    assert base is not None
    if saved.shape[1] != weight.shape[1] or len(saved) < len(weight):
        raise ShapeError(weights.where(key), list(saved.shape), list(weight.shape))
    added = len(saved) - len(weight)
    if added > base.extra_tokens:
        raise no_room(weights.where(key), len(saved), len(weight), base.extra_tokens)
    changed = []
    for start in range(0, len(weight), _ROWS):
        before = weight[start : start + _ROWS]
        rows = saved[start : start + len(before)]
        same = torch.zeros(len(rows), dtype=torch.bool)
        for dtype in DTYPES:
            same |= (before.to(dtype).float() == rows).all(1)
        changed.append(start + (~same).nonzero().squeeze(1))
    return torch.cat([*changed, torch.arange(len(weight), len(saved))])
