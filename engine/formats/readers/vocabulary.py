"""What a LoRA of PEFT's has on the vocabulary.

Keys: `base_model.model.model.embed_tokens.lora_embedding_A` `[r, tokens]`, `.lora_embedding_B`
`[hidden, r]`; `base_model.model.lm_head.lora_A.weight`, `.lora_B.weight`. Beside them PEFT saves
the whole weight that was adapted, `.base_layer.weight`, which is the base's own unless somebody
changed it. With tied weights what is adapted is what has a pair in the file, and the other is the
base's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.base_weights import vocabulary_weight
from molehill.engine.adapter.errors import CorruptFileError, ShapeError, UnsupportedError
from molehill.engine.adapter.module_names import AROUND_LAYERS, canonical
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, HEADS, is_embedding
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers.lowrank import PairNames, Scaling, build_experts
from molehill.engine.formats.readers.targeting import Targeting
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant

# Of a pair, by whether it is on the embedding.
PARTS = {True: ("lora_embedding_A", "lora_embedding_B"), False: ("lora_A.weight", "lora_B.weight")}
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>{AROUND_LAYERS}(?:{'|'.join((*EMBEDDINGS, *HEADS))}))"
    r"\.(?P<part>lora_embedding_[AB]|lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|base_layer\.weight)"
)
# Rows compared at a time.
_ROWS = 1 << 14


@dataclass(frozen=True)
class VocabularyTensors:
    """keys: the names in the file by module and part. rest: all other tensors."""

    rest: Weights
    keys: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def pairs(self) -> list[str]:
        """The modules that have a pair."""
        return [module for module, keys in self.keys.items() if set(keys) - {"base_layer.weight"}]


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
            if part not in (a, b, "base_layer.weight"):
                noun = "the embedding" if is_embedding(site) else "the LM head"
                what = "DoRA" if "magnitude" in part else f"an unknown tensor of {noun}"
                raise UnsupportedError(weights.where(key), what, f"plain LoRA on {noun}: {a}, {b}")
        if "base_layer.weight" in keys:
            _check_whole(weights, keys["base_layer.weight"], site, base)
        if module in on_vocabulary.pairs:
            stem = f"base_model.model.{module}"
            pair = PairNames(keys.get(a, f"{stem}.{a}"), keys.get(b, f"{stem}.{b}"))
            experts = build_experts(weights, [pair], scaling(module))
            sites[site] = LinearMixture(experts, Constant((1.0,)))
    return sites


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


def changed_rows(weights: Weights, key: str, site: str, base: BaseModel | None) -> Tensor:
    """The ids int64 `[n]` of the rows in which a whole weight of the file differs from the base's
    own, in the base's dtype and in those that it may have been saved in.

    Raises UnsupportedError where there is no base to compare with, ShapeError.
    """
    saved = weights.tensor(key, 2)
    if base is None:
        expected = "the base model, to compare it with (--model, --base)"
        raise UnsupportedError(weights.where(key), f"the whole weight of {site}", expected)
    weight = vocabulary_weight(base.name, site, base.tied)
    if saved.shape != weight.shape:
        raise ShapeError(weights.where(key), list(saved.shape), list(weight.shape))
    changed = []
    for start in range(0, len(saved), _ROWS):
        rows, before = saved[start : start + _ROWS], weight[start : start + _ROWS]
        same = torch.zeros(len(rows), dtype=torch.bool)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            same |= (before.to(dtype).float() == rows).all(1)
        changed.append(start + (~same).nonzero().squeeze(1))
    return torch.cat(changed)
