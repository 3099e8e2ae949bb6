"""LD-MoLE (arXiv 2509.25684) as its authors' fork of PEFT writes it, `peft_type` LORA.

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.` with `lora_route.weight` [E, in],
`lora_A{e}.weight`, `lora_B{e}.weight`; with `lora_nums` 1 there is no router. One MLP for each
width of inputs is shared by all linears, and saved once with every one of them, whatever its width,
and once more by itself: `{linear}.sparsegen` and `base_model.sparsegen_fn`, followed by
`.mlp.proj_layers.{in}.` and `0.weight` [H, in], `0.bias` [H], `2.weight` [1, H], `2.bias` [1].
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.engine.adapter.errors import (
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, linears, peft, saved_modules
from molehill.engine.formats.readers.linears import EXPERT, STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts, read_router
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant, Sparsegen

_KEY = re.compile(rf"{STEM}\.(?:lora_route|lora_[AB]{EXPERT})\.weight")
_MLP = re.compile(
    r"(?:base_model\.sparsegen_fn|base_model\.model\..+\.sparsegen)\.mlp\.proj_layers\."
    r"(?P<width>[1-9]\d{0,6})\.(?P<part>[02]\.(?:weight|bias))"
)
_LAYOUT = PartNames("ldmole", "lora_route.weight", "lora_A{e}.weight", "lora_B{e}.weight")
_SHARED = "base_model.sparsegen_fn.mlp.proj_layers"

# The last two come from code that is not published.
_UNSERVED = {
    **peft.FORKS_UNSERVED,
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scaling",
    "rank_pattern": "ranks by pattern",
    "alpha_pattern": "scalings by pattern",
    "target_parameters": "LoRA on fused experts",
    "use_abs": "a router of absolute values",
    "selected_topk": "a top-k of experts",
}


@dataclass(frozen=True)
class _Mlp:
    """rows `[H, in]`: of the hidden layer. parameters `[2 H + 1]`: as Sparsegen has them."""

    rows: Tensor
    parameters: Tensor


def recognises(config: Fields, weights: Weights) -> bool:
    """By the MLP's tensors, or the config that promises them."""
    declared = config.object("sparsegen_cfg").flag("enabled")
    return declared or any("sparsegen" in name for name in weights.tensors)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    config.refuse(_UNSERVED)
    beside = peft.check_initialisation(config)
    if config.object("ReLUMoE_cfg").flag("enabled"):
        where = f"{config.where}: ReLUMoE_cfg"
        raise UnsupportedError(where, "ReLUMoE's router", "LD-MoLE's")
    mlps = _mlps(weights)
    if config.has("sparsegen_cfg") and not config.object("sparsegen_cfg").flag("enabled"):
        raise config.error("sparsegen_cfg", "enabled true, as the file has tensors for it")
    tensors = {name: t for name, t in weights.tensors.items() if "sparsegen" not in name}
    weights = Weights(weights.file, tensors)
    notes = saved_modules.check(config, weights)
    expected = "lora_route, lora_A or lora_B of a layer's linear, or its sparsegen"
    stems = linears.find_stems(weights, _KEY, expected)
    warnings = linears.check_targets(config, weights, stems, files.base)
    sites = {module: _mixture(config, weights, mlps, stem) for module, stem in stems.items()}
    experts = {stems[module]: mixture.num_experts for module, mixture in sites.items()}
    linears.check_all_used(weights, _LAYOUT, experts)
    notes += beside + known.warnings(config, known.FIELDS["ldmole"])
    notes += known.warnings(config.object("sparsegen_cfg"), known.SPARSEGEN)
    return Adapter("ldmole", sites, config.text("base_model_name_or_path"), warnings + notes)


READER = Reader(
    PEFT_FILES,
    read,
    peft_types=("LORA",),
    recognises=recognises,
    no_layout=None,
)


def _mlps(weights: Weights) -> dict[int, _Mlp]:
    """The shared MLPs by their width. Raises CorruptFileError if copies of one differ."""
    first: dict[str, str] = {}
    widths: dict[int, None] = {}
    for name, tensor in weights.tensors.items():
        if "sparsegen" not in name:
            continue
        match = _MLP.fullmatch(name)
        if match is None:
            expected = "sparsegen's proj_layers, 0 and 2, weight and bias"
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
        widths[int(match["width"])] = None
        other = first.setdefault(f"{_SHARED}.{match['width']}.{match['part']}", name)
        if not torch.equal(weights.tensors[other], tensor):
            raise CorruptFileError(weights.where(name), "other values", f"those of {other}")
    shared = Weights(
        weights.file, {name: weights.tensors[original] for name, original in first.items()}
    )
    return {width: _mlp(shared, width) for width in widths}


def _mlp(shared: Weights, width: int) -> _Mlp:
    stem = f"{_SHARED}.{width}"
    rows = shared.tensor(f"{stem}.0.weight", 2)
    hidden = rows.shape[0]
    shapes = {"0.weight": [hidden, width], "0.bias": [hidden], "2.weight": [1, hidden]}
    parts = {}
    for part, shape in {**shapes, "2.bias": [1]}.items():
        parts[part] = shared.tensor(f"{stem}.{part}", len(shape))
        if list(parts[part].shape) != shape:
            raise ShapeError(shared.where(f"{stem}.{part}"), list(parts[part].shape), shape)
    return _Mlp(rows, torch.cat([parts["0.bias"], parts["2.weight"][0], parts["2.bias"]]))


def _mixture(config: Fields, weights: Weights, mlps: dict[int, _Mlp], stem: str) -> LinearMixture:
    scaling = Scaling(config.number("lora_alpha", above=0), config.integer("r"))
    name = f"{stem}.{_LAYOUT.router}"
    if config.integer("lora_nums", 2) == 1 and name not in weights.tensors:
        return LinearMixture(
            build_experts(weights, _LAYOUT.pairs(stem, 1), scaling), Constant((1.0,))
        )
    count = linears.count_experts(config, "lora_nums", weights, name)
    experts = build_experts(weights, _LAYOUT.pairs(stem, count), scaling)
    width = experts.a.shape[1]
    router = read_router(weights, name, width)
    if width not in mlps:
        where = weights.where(f"{_SHARED}.{width}.0.weight")
        raise MissingTensorError(where, "no such tensor", f"the MLP that {stem} shares")
    mlp = mlps[width]
    policy = Sparsegen(mlp.rows.shape[0])
    return LinearMixture(experts, policy, torch.cat([router, mlp.rows]), parameters=mlp.parameters)
