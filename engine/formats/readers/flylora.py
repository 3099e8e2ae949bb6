"""FlyLoRA (arXiv 2510.08396) as its authors' fork of PEFT writes it, `peft_type` LORA.

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.` with `lora_A.weight` [r, in],
`lora_B.weight` [out, r] and `lora_topk_bias` [r]. Each rank is an expert, and A is the router too:
the `top_k` of the config's that are greatest in A x + bias stay, the others are 0. The authors'
forward goes on training the biases while it serves; here they are what the file says.
"""

import re

from molehill.engine.adapter.errors import ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, linears, peft, saved_modules
from molehill.engine.formats.readers.linears import STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts, read_scaling
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import FlyLoRA

_BIASES = "lora_topk_bias"
_KEY = re.compile(rf"{STEM}\.(?:lora_[AB]\.weight|{_BIASES})")
_LAYOUT = PartNames("flylora", _BIASES, "lora_A.weight", "lora_B.weight")
# A's own, which leaves the base weights as they are.
_SPARSE = "sparse"
_FIELDS = ("bias_u", "top_k")

_UNSERVED = {
    **peft.FORKS_UNSERVED,
    "use_dora": "DoRA",
    "rank_pattern": "ranks by pattern",
    "alpha_pattern": "scalings by pattern",
    "target_parameters": "LoRA on fused experts",
}


def recognises(config: Fields, weights: Weights) -> bool:
    """By the biases, or a config that promises them. Asked after the forks, which know MoLA's
    top_k by its router."""
    declared = any(config.has(name) for name in _FIELDS)
    return declared or any(_BIASES in name for name in weights.tensors)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    config.refuse(_UNSERVED)
    if config.values.get("init_lora_weights") != _SPARSE:
        peft.check_initialisation(config)
    notes = saved_modules.check(config, weights)
    expected = "lora_A, lora_B or lora_topk_bias of a layer's linear"
    stems = linears.find_stems(weights, _KEY, expected)
    warnings = linears.check_targets(config, weights, stems, files.base)
    scaling = read_scaling(config)
    sites = {module: _mixture(config, weights, stem, scaling) for module, stem in stems.items()}
    notes += known.warnings(config, known.FIELDS["flylora"])
    return Adapter("flylora", sites, config.text("base_model_name_or_path"), warnings + notes)


READER = Reader(
    PEFT_FILES,
    read,
    peft_types=("LORA",),
    recognises=recognises,
    no_layout=None,
)


def _mixture(config: Fields, weights: Weights, stem: str, scaling: Scaling) -> LinearMixture:
    pair = build_experts(weights, _LAYOUT.pairs(stem, 1), scaling)
    (rank,) = pair.ranks
    name = f"{stem}.{_BIASES}"
    biases = weights.tensor(name, 1)
    if biases.shape[0] != rank:
        raise ShapeError(weights.where(name), list(biases.shape), [rank])
    k = config.integer("top_k")
    if k > rank:
        raise config.error("top_k", f"at most the rank, {rank}")
    experts = Experts(pair.a, pair.b, (1,) * rank)
    return LinearMixture(experts, FlyLoRA(k, rank), pair.a, parameters=biases)
