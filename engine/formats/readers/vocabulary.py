"""What a LoRA of PEFT's has on the vocabulary.

Keys: `base_model.model.model.embed_tokens.lora_embedding_A` `[r, tokens]`, `.lora_embedding_B`
`[hidden, r]`; `base_model.model.lm_head.lora_A.weight`, `.lora_B.weight`. Beside them PEFT saves
the whole weight that was adapted, `.base_layer.weight`, which is the base's own unless somebody
changed it. With tied weights what is adapted is what has a pair in the file, and the other is the
base's.

Whole modules (`modules_to_save`) are `.weight`, rows of `trainable_token_indices`
`.token_adapter.trainable_tokens_delta` `[n, hidden]`, which are the rows themselves and no deltas.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.base_weights import vocabulary_tensor
from molehill.engine.adapter.errors import CorruptFileError, ShapeError, UnsupportedError
from molehill.engine.adapter.module_names import AROUND_LAYERS, canonical
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, HEADS, is_embedding, is_head
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers.lowrank import PairNames, Scaling, build_experts
from molehill.engine.formats.readers.targeting import Targeting
from molehill.kernels.mixture import LinearMixture, VocabularyRows
from molehill.kernels.policy import Constant

# Of a pair, by whether it is on the embedding.
PARTS = {True: ("lora_embedding_A", "lora_embedding_B"), False: ("lora_A.weight", "lora_B.weight")}
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>{AROUND_LAYERS}(?:{'|'.join((*EMBEDDINGS, *HEADS))}))"
    r"\.(?P<part>lora_embedding_[AB]|lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|base_layer\.weight|base_layer\.bias|weight|token_adapter\.trainable_tokens_delta)"
)
_WHOLE, _ROWS_OF_TOKENS = "weight", "token_adapter.trainable_tokens_delta"
_SAVED = "modules_to_save"
_INDICES = "trainable_token_indices"
# Rows compared at a time.
_ROWS = 1 << 14
# That a weight may have been saved in.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VocabularyTensors:
    """keys: the names in the file by module and part. rest: all other tensors."""

    rest: Weights
    keys: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def pairs(self) -> list[str]:
        """The modules that have a pair, or parts of one."""
        others = {"base_layer.weight", "base_layer.bias", _WHOLE, _ROWS_OF_TOKENS}
        return [module for module, keys in self.keys.items() if set(keys) - others]

    def having(self, part: str) -> dict[str, str]:
        """The keys of one part by module."""
        return {module: keys[part] for module, keys in self.keys.items() if part in keys}


def find(weights: Weights) -> VocabularyTensors:
    """Takes apart what is on the vocabulary and what is not. Raises CorruptFileError."""
    keys: dict[str, dict[str, str]] = {}
    for key in weights.tensors:
        match = _KEY.fullmatch(key)
        if match is not None:
            keys.setdefault(match["module"], {})[match["part"]] = key
    sites = [canonical(module) for module in keys]
    if len(sites) != len(set(sites)):
        raise CorruptFileError(weights.where(max(keys)), "two spellings of one module", "one")
    taken = {key for parts in keys.values() for key in parts.values()}
    rest = {key: tensor for key, tensor in weights.tensors.items() if key not in taken}
    return VocabularyTensors(replace(weights, tensors=rest), keys)


def read(
    config: Fields,
    weights: Weights,
    on_vocabulary: VocabularyTensors,
    targeting: Targeting,
    scaling: Callable[[str], Scaling],
    base: BaseModel | None,
) -> dict[str, LinearMixture]:
    """The pairs by site. base: what the adapter is read for, whose weights a whole one in the file
    is compared with. Raises an AdapterError."""
    sites = {}
    _check_targets(config, weights, on_vocabulary, targeting)
    for module, keys in on_vocabulary.keys.items():
        site = canonical(module)
        a, b = PARTS[is_embedding(site)]
        for part, key in keys.items():
            if part not in (a, b, "base_layer.weight", "base_layer.bias", _WHOLE, _ROWS_OF_TOKENS):
                noun = "the embedding" if is_embedding(site) else "the LM head"
                what = "DoRA" if "magnitude" in part else f"an unknown tensor of {noun}"
                raise UnsupportedError(weights.where(key), what, f"plain LoRA on {noun}: {a}, {b}")
        if "base_layer.weight" in keys:
            _check_whole(weights, keys["base_layer.weight"], site, base)
        if "base_layer.bias" in keys:
            _check_bias(weights, keys["base_layer.bias"], site, base)
        if module in on_vocabulary.pairs:
            stem = f"base_model.model.{module}"
            pair = PairNames(keys.get(a, f"{stem}.{a}"), keys.get(b, f"{stem}.{b}"))
            experts = build_experts(weights, [pair], scaling(module))
            sites[site] = LinearMixture(experts, Constant((1.0,)))
    return sites


def read_rows(
    config: Fields, weights: Weights, on_vocabulary: VocabularyTensors, base: BaseModel | None
) -> dict[str, VocabularyRows]:
    """The rows by site that are not the base's: of whole modules (`modules_to_save`), which are
    compared with the base's, and of single tokens (`trainable_token_indices`).

    Raises an AdapterError.
    """
    tables = {}
    for module, key in on_vocabulary.having(_WHOLE).items():
        site = canonical(module)
        _check_saved(config, module, base)
        ids = changed_rows(weights, key, site, base)
        if len(ids):
            tables[site] = VocabularyRows(ids, weights.tensors[key][ids])
    tables |= _rows_of_tokens(config, weights, on_vocabulary, base)
    return tables


def _check_saved(config: Fields, module: str, base: BaseModel | None) -> None:
    """Raises UnsupportedError for a whole module that PEFT would not take out of the file, and
    where there is no base to compare it with."""
    where, leaf = f"{config.where}: {_SAVED}", module.rpartition(".")[2]
    if not any(module == name or module.endswith(f".{name}") for name in config.texts(_SAVED)):
        tied = config.flag("ensure_weight_tying") and bool(config.texts(_SAVED))
        if not tied:
            expected = "the module among modules_to_save, or no tensors for it"
            found = f"a whole module that it does not name ({leaf})"
            raise UnsupportedError(where, found, expected)
    if base is None:
        expected = "no tensors for it, or the base model, to compare it with (--model, --base)"
        raise UnsupportedError(where, f"whole modules ({leaf})", expected)


def _rows_of_tokens(
    config: Fields, weights: Weights, on_vocabulary: VocabularyTensors, base: BaseModel | None
) -> dict[str, VocabularyRows]:
    keys = on_vocabulary.having(_ROWS_OF_TOKENS)
    indices = config.values.get(_INDICES)
    if not keys and indices in (None, [], {}):
        return {}
    where = f"{config.where}: {_INDICES}"
    if not keys or indices in (None, [], {}):
        expected = f"the field absent and no {_ROWS_OF_TOKENS}, or both"
        raise UnsupportedError(where, "trained token embeddings", expected)
    if base is None:
        expected = "the base model, to know whether its head is tied (--model, --base)"
        raise UnsupportedError(where, "trained token embeddings", expected)
    tables = {}
    by_site = {}
    for module, key in keys.items():
        site = canonical(module)
        ids = by_site[site] = _token_ids(config, indices, module)
        rows = weights.tensor(key, 2)
        if len(rows) != len(ids):
            raise ShapeError(weights.where(key), list(rows.shape), [len(ids), rows.shape[1]])
        order = ids.argsort()
        tables[site] = VocabularyRows(ids[order], rows[order])
    for site in [site for site in tables if is_embedding(site)]:
        heads = [name for name in base.vocabulary if is_head(name)]
        if base.tied and not any(head in tables for head in heads):
            # PEFT then has the tied head use the embedding's rows.
            tables |= dict.fromkeys(heads, tables[site])
    return tables


def _token_ids(config: Fields, indices: Any, module: str) -> Tensor:
    """int64, as the rows lie. Raises ConfigError."""
    if isinstance(indices, Mapping):
        names = [name for name in indices if module == name or module.endswith(f".{name}")]
        indices = indices[names[0]] if len(names) == 1 else None
    if (
        not isinstance(indices, list)
        or not all(type(i) is int and 0 <= i < 1 << 24 for i in indices)
        or len(set(indices)) < len(indices)
    ):
        raise config.error(_INDICES, f"a list of token ids, each once, for {module}")
    return torch.tensor(indices, dtype=torch.int64)


def _check_targets(
    config: Fields, weights: Weights, on_vocabulary: VocabularyTensors, targeting: Targeting
) -> None:
    """PEFT drops the tensors of other modules; `ensure_weight_tying` adapts the one that is tied to
    a target as well. Raises UnsupportedError."""
    against = {module: targeting.against(module) for module in on_vocabulary.pairs}
    tying = config.flag("ensure_weight_tying") and None in against.values()
    for module, name in against.items():
        if name is not None and not (tying and name == "target_modules"):
            key = min(on_vocabulary.keys[module].values())
            expected = f"none, as {name} does not adapt it"
            raise UnsupportedError(weights.where(key), "tensors of an untargeted module", expected)


def _check_whole(weights: Weights, key: str, site: str, base: BaseModel | None) -> None:
    """A whole weight in the file must be the base's. Raises UnsupportedError, ShapeError."""
    changed = changed_rows(weights, key, site, base)
    if len(changed):
        found = f"{len(changed)} rows that are not the base's"
        raise UnsupportedError(weights.where(key), found, "the base's own")


def _check_bias(weights: Weights, key: str, site: str, base: BaseModel | None) -> None:
    """A head's bias in the file must be the base's. Raises UnsupportedError, ShapeError."""
    saved, bias = weights.tensor(key, 1), _of_base(weights, key, site, base, "bias")
    if saved.shape != bias.shape:
        raise ShapeError(weights.where(key), list(saved.shape), list(bias.shape))
    if not any(torch.equal(saved, bias.to(dtype).float()) for dtype in _DTYPES):
        raise UnsupportedError(weights.where(key), "a bias that is not the base's", "its own")


def _of_base(
    weights: Weights, key: str, site: str, base: BaseModel | None, part: Literal["weight", "bias"]
) -> Tensor:
    if base is None:
        expected = "the base model, to compare it with (--model, --base)"
        raise UnsupportedError(weights.where(key), f"the whole {part} of {site}", expected)
    return vocabulary_tensor(base.name, site, base.tied, part)


def changed_rows(weights: Weights, key: str, site: str, base: BaseModel | None) -> Tensor:
    """The ids int64 `[n]` of the rows in which a whole weight of the file differs from the base's
    own, in the base's dtype and in those that it may have been saved in.

    Raises UnsupportedError where there is no base to compare with, ShapeError.
    """
    saved = weights.tensor(key, 2)
    weight = _of_base(weights, key, site, base, "weight")
    if len(saved) > len(weight):
        found = f"{len(saved)} tokens, some of them added to the base's vocabulary"
        raise UnsupportedError(weights.where(key), found, f"the base's {len(weight)}")
    if saved.shape != weight.shape:
        raise ShapeError(weights.where(key), list(saved.shape), list(weight.shape))
    changed = []
    for start in range(0, len(saved), _ROWS):
        rows, before = saved[start : start + _ROWS], weight[start : start + _ROWS]
        same = torch.zeros(len(rows), dtype=torch.bool)
        for dtype in _DTYPES:
            same |= (before.to(dtype).float() == rows).all(1)
        changed.append(start + (~same).nonzero().squeeze(1))
    return torch.cat(changed)
