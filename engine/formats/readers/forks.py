"""MoLA, LoRAMoE and HydraLoRA as their authors' forks of PEFT write them.

All three call themselves `peft_type` LORA; their tensors tell them apart. Keys:
`base_model.model.model.layers.{i}.{block}.{proj}.` with

    MoLA       `router.router.weight` [E, in], `lora_A_{e}.weight`, `lora_B_{e}.weight`
    LoRAMoE    `lora_route.weight`    [E, in], `lora_A{e}.weight`,  `lora_B{e}.weight`
    HydraLoRA  `lora_route.weight`    [E, in], `lora_A.weight` (one), `lora_B{e}.weight`

MoLA's E and r differ by layer, and its k is saved nowhere.
"""

import re
from collections.abc import Collection

from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, linears, peft, saved_modules
from molehill.engine.formats.readers.linears import EXPERT, STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts, read_router
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Policy, Soft, TopK

_KEY = re.compile(rf"{STEM}\.(?P<part>router\.router|lora_route|lora_[AB](?:_?{EXPERT})?)\.weight")
_SIGN = re.compile(r"\.(?:router\.router|lora_route|lora_[AB]_?\d+)\.")
_DEFAULT_TOP_K = 2

# Fields that no fork has; one that sets them is another, unknown code.
_UNKNOWN = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scaling",
    "rank_pattern": "ranks by pattern",
    "alpha_pattern": "scalings by pattern",
    "target_parameters": "LoRA on fused experts",
    "sparsegen": "LD-MoLE's router",
}


_MOLA = PartNames("mola", "router.router.weight", "lora_A_{e}.weight", "lora_B_{e}.weight")
_LORAMOE = PartNames("loramoe", "lora_route.weight", "lora_A{e}.weight", "lora_B{e}.weight")
# The shared A is repeated for each expert: the canonical form knows pairs only.
_HYDRALORA = PartNames("hydralora", "lora_route.weight", "lora_A.weight", "lora_B{e}.weight")


def recognises(config: Fields, weights: Weights) -> bool:
    """Whether there are tensors that only a fork writes."""
    return any(_SIGN.search(name) for name in weights.tensors)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    config.refuse({**peft.FORKS_UNSERVED, **_UNKNOWN})
    beside = peft.check_initialisation(config)
    notes = saved_modules.check(config, weights)
    stems = linears.find_stems(weights, _KEY, "a router, lora_A or lora_B of a layer's linear")
    fork = _fork(weights)
    warnings = linears.check_targets(config, weights, stems, files.base)
    sites = {
        module: _mixture(config, weights, fork, module, stem) for module, stem in stems.items()
    }
    experts = {stems[module]: mixture.num_experts for module, mixture in sites.items()}
    linears.check_all_used(weights, fork, experts)
    base_model = config.text("base_model_name_or_path")
    notes += beside + _warnings(config, fork) + known.warnings(config, _known(fork))
    return Adapter(fork.method, sites, base_model, warnings + notes)


READER = Reader(
    PEFT_FILES,
    read,
    peft_types=("LORA",),
    recognises=recognises,
    no_layout=None,
)


def _fork(weights: Weights) -> PartNames:
    parts = {match["part"] for match in map(_KEY.fullmatch, weights.tensors) if match}
    if any(part == "router.router" or re.match(r"lora_[AB]_", part) for part in parts):
        return _MOLA
    return _HYDRALORA if "lora_A" in parts else _LORAMOE


def _mixture(
    config: Fields, weights: Weights, fork: PartNames, module: str, stem: str
) -> LinearMixture:
    router = f"{stem}.{fork.router}"
    count = linears.count_experts(config, "lora_nums", weights, router)
    experts = build_experts(weights, fork.pairs(stem, count), _scaling(config, module))
    gate = read_router(weights, router, experts.a.shape[1])
    return LinearMixture(experts, _policy(config, fork, module), gate)


def _scaling(config: Fields, module: str) -> Scaling:
    return Scaling(config.number("lora_alpha", above=0), _of_layer(config, "r", module))


def _policy(config: Fields, fork: PartNames, module: str) -> Policy:
    if fork is not _MOLA:
        return Soft()
    return TopK(_of_layer(config, "top_k", module) if config.has("top_k") else _DEFAULT_TOP_K)


def _of_layer(config: Fields, name: str, module: str) -> int:
    """A field that is one whole number, or a list of one for each layer."""
    if not isinstance(config.values.get(name), list):
        return config.integer(name)
    return config.items(name).integer(module.split(".")[1])


def _known(fork: PartNames) -> Collection[str]:
    official = f"{fork.method}-official"
    return known.FIELDS[official if official in known.FIELDS else fork.method]


def _warnings(config: Fields, fork: PartNames) -> tuple[str, ...]:
    if fork is not _MOLA or config.has("top_k"):
        return ()
    return (
        f"top_k is not in adapter_config.json: {_DEFAULT_TOP_K} is assumed, MoLA's default; "
        'add "top_k": a whole number or a list of one for each layer, if it was trained otherwise',
    )
