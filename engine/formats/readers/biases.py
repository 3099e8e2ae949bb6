"""Biases of the base model's own modules, which PEFT's `bias` has trained beside an adapter.

PEFT saves them whole: `{module}.base_layer.bias` where the module is adapted, `{module}.bias` where
it is not. Any of PEFT's tuners that has the field may have them. A bias of `lora_B` (`lora_bias`)
is none of them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from molehill.engine.adapter.errors import CorruptFileError, UnsupportedError
from molehill.engine.adapter.module_names import AROUND_LAYERS, LAYER, canonical
from molehill.engine.formats.io.fields import Fields, shortened
from molehill.engine.formats.io.files import Weights
from molehill.kernels.mixture import Bias

MERGED = "the model with it merged in (PEFT's merge_and_unload), which is served as a base"

_FIELD = "bias"
_BASES_OWN = re.compile(r"base_model\.model\.(?P<module>[\w.]+?)(?:\.base_layer)?\.bias")
_IN_LAYERS = re.compile(rf"{AROUND_LAYERS}{LAYER}[\w.]+")
# What normalisations are called: `input_layernorm`, `norm1`, `ln_1`.
_NORMALISATION = re.compile(r"(?:.*\.)?(?:\w*norm\w*|ln_\w+)", re.IGNORECASE)


def split(config: Fields, weights: Weights) -> tuple[Weights, dict[str, Bias], tuple[str, ...]]:
    """The adapter's own tensors, the trained biases by canonical name, and warnings.

    Raises UnsupportedError for a bias that `bias` does not allow, or that is no linear's inside the
    layers; CorruptFileError, ShapeError.
    """
    trained: dict[str, Bias] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        match = _BASES_OWN.fullmatch(name)
        if match is None or "lora_" in name:
            rest[name] = tensor
            continue
        _check(config, weights, name, match["module"])
        site = canonical(match["module"])
        if site in trained:
            raise CorruptFileError(weights.where(name), "a second bias of this module", "one")
        trained[site] = Bias(trained=weights.tensor(name, 1))
    said = config.values.get(_FIELD)
    notes: tuple[str, ...] = ()
    if not trained and said not in (None, False, "none"):
        notes = (f"bias is {shortened(said)}, but the file has none of the base's: no effect",)
    return replace(weights, tensors=rest), trained, notes


def with_added(trained: Mapping[str, Bias], added: Mapping[str, Tensor]) -> dict[str, Bias]:
    """added: `[out]` by site, scaling folded in."""
    biases = dict(trained)
    for site, tensor in added.items():
        biases[site] = replace(biases.get(site, Bias()), added=tensor)
    return biases


def _check(config: Fields, weights: Weights, name: str, module: str) -> None:
    if config.values.get(_FIELD) in (None, False, "none"):
        raise UnsupportedError(weights.where(name), "a trained bias", "none, as bias is 'none'")
    if _IN_LAYERS.fullmatch(module) is None or _NORMALISATION.fullmatch(module):
        expected = (
            "biases of linears inside the layers alone (bias 'none' or lora_only when it is "
            f"trained), or {MERGED}"
        )
        raise UnsupportedError(weights.where(name), f"a trained bias of {module}", expected)
