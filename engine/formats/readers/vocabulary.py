"""Pairs of a LoRA of PEFT's on the embedding and on the LM head."""

from collections.abc import Callable

import torch

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.module_names import canonical
from molehill.engine.adapter.vocabulary_sites import is_embedding
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers.lowrank import PairNames, Scaling, build_experts
from molehill.engine.formats.readers.targeting import Targeting
from molehill.engine.formats.readers.vocabulary_rows import DTYPES, of_base
from molehill.engine.formats.readers.vocabulary_tensors import (
    ROWS_OF_TOKENS,
    UNDER_PAIR,
    UNDER_ROWS,
    UNUSED,
    WHOLE,
    VocabularyTensors,
)
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant

# Of a pair, by whether it is on the embedding.
PARTS = {True: ("lora_embedding_A", "lora_embedding_B"), False: ("lora_A.weight", "lora_B.weight")}


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
            others = (UNDER_PAIR, "base_layer.bias", WHOLE, ROWS_OF_TOKENS, UNDER_ROWS, *UNUSED)
            if part not in (a, b, *others):
                noun = "the embedding" if is_embedding(site) else "the LM head"
                what = "DoRA" if "magnitude" in part else f"an unknown tensor of {noun}"
                raise UnsupportedError(weights.where(key), what, f"plain LoRA on {noun}: {a}, {b}")
        if "base_layer.bias" in keys:
            _check_bias(weights, keys["base_layer.bias"], site, base)
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


def _check_bias(weights: Weights, key: str, site: str, base: BaseModel | None) -> None:
    """A head's bias in the file must be the base's. Raises UnsupportedError, ShapeError."""
    saved, bias = weights.tensor(key, 1), of_base(weights, key, site, base, "bias")
    if saved.shape != bias.shape:
        raise ShapeError(weights.where(key), list(saved.shape), list(bias.shape))
    if not any(torch.equal(saved, bias.to(dtype).float()) for dtype in DTYPES):
        raise UnsupportedError(weights.where(key), "a bias that is not the base's", "its own")
