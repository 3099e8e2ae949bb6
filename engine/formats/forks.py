"""MoLA, LoRAMoE and HydraLoRA as their authors' forks of PEFT write them.

All three call themselves `peft_type` LORA; their tensors tell them apart. Keys:
`base_model.model.model.layers.{i}.{block}.{proj}.` with

    MoLA       `router.router.weight` [E, in], `lora_A_{e}.weight`, `lora_B_{e}.weight`
    LoRAMoE    `lora_route.weight`    [E, in], `lora_A{e}.weight`,  `lora_B{e}.weight`
    HydraLoRA  `lora_route.weight`    [E, in], `lora_A.weight` (one), `lora_B{e}.weight`

MoLA's E and r differ by layer, and its k is saved nowhere.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from molehill.engine.adapter import Adapter
from molehill.engine.errors import CorruptFileError, ShapeError, UnsupportedError
from molehill.engine.formats import peft, targets
from molehill.engine.formats.fields import Fields
from molehill.engine.formats.files import Weights
from molehill.engine.formats.lowrank import Pair, Scaling, build_experts, read_router
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Policy, Soft, TopK

_KEY = re.compile(
    r"(?P<stem>base_model\.model\.(?:model\.)?"
    r"(?P<module>layers\.(?:0|[1-9]\d{0,4})\.(?:\w+\.)*?\w+))"
    r"\.(?P<part>router\.router|lora_route|lora_[AB](?:_?(?:0|[1-9]\d{0,5}))?)\.weight"
)
_SIGN = re.compile(r"\.(?:router\.router|lora_route|lora_[AB]_?\d+|sparsegen)\.|sparsegen_fn")
_DEFAULT_TOP_K = 2

# Fields that no fork has; one that sets them is another, unknown code.
_UNKNOWN = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scaling",
    "rank_pattern": "ranks by pattern",
    "alpha_pattern": "scalings by pattern",
    "enable_lora": "a LoRA on parts of a fused linear",
    "sparsegen": "LD-MoLE's router",
}


@dataclass(frozen=True)
class _Fork:
    """A method and the names of its parts; `{e}` is the expert."""

    kind: str
    router: str
    a: str
    b: str


_MOLA = _Fork("mola", "router.router", "lora_A_{e}", "lora_B_{e}")
_LORAMOE = _Fork("loramoe", "lora_route", "lora_A{e}", "lora_B{e}")
# The shared A is repeated for each expert: the canonical form knows pairs only.
_HYDRALORA = _Fork("hydralora", "lora_route", "lora_A", "lora_B{e}")


def recognises(weights: Weights) -> bool:
    """Whether there are tensors that only a fork writes (LD-MoLE's among them)."""
    return any(_SIGN.search(name) for name in weights.tensors)


def read(config: Fields, weights: Weights) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config.refuse({**peft.UNSERVED, **_UNKNOWN})
    wanted = targets.read_targets(config)
    stems = _stems(weights)
    fork = _fork(weights)
    targets.check_targeted(weights.file, stems, wanted)
    if not config.has("layers_to_transform") and wanted and not any("." in t for t in wanted):
        targets.check_every_layer(weights.file, stems)
    sites = {
        module: _mixture(config, weights, fork, module, stem) for module, stem in stems.items()
    }
    experts = {module: mixture.num_experts for module, mixture in sites.items()}
    _check_all_used(weights, fork, {stems[module]: count for module, count in experts.items()})
    base_model = config.text("base_model_name_or_path")
    warnings = targets.unused(wanted, stems) + _warnings(config, fork)
    return Adapter(fork.kind, sites, base_model, warnings)


def _stems(weights: Weights) -> dict[str, str]:
    """Where each module's tensors begin in the file, by the module's canonical name."""
    stems: dict[str, str] = {}
    for name in weights.tensors:
        if "sparsegen" in name:
            expected = "MoLA, LoRAMoE or HydraLoRA"
            raise UnsupportedError(weights.where(name), "LD-MoLE's router", expected)
        match = _KEY.fullmatch(name)
        if match is None:
            expected = "a router, lora_A or lora_B of a layer's linear"
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
        if stems.setdefault(match["module"], match["stem"]) != match["stem"]:
            raise CorruptFileError(weights.where(name), "two spellings of one module", "one")
    return stems


def _fork(weights: Weights) -> _Fork:
    parts = {match["part"] for match in map(_KEY.fullmatch, weights.tensors) if match}
    if any(part == "router.router" or re.match(r"lora_[AB]_", part) for part in parts):
        return _MOLA
    return _HYDRALORA if "lora_A" in parts else _LORAMOE


def _mixture(
    config: Fields, weights: Weights, fork: _Fork, module: str, stem: str
) -> LinearMixture:
    router = f"{stem}.{fork.router}.weight"
    rows = weights.tensor(router, 2).shape[0]
    if config.has("lora_nums") and config.integer("lora_nums") != rows:
        expected = f"lora_nums {config.integer('lora_nums')}"
        raise ShapeError(weights.where(router), f"{rows} experts", expected)
    pairs = [
        Pair(f"{stem}.{fork.a.format(e=e)}.weight", f"{stem}.{fork.b.format(e=e)}.weight")
        for e in range(rows)
    ]
    experts = build_experts(weights, pairs, _scaling(config, module))
    gate = read_router(weights, router, experts.a.shape[1])
    return LinearMixture(experts, _policy(config, fork, module), gate)


def _scaling(config: Fields, module: str) -> Scaling:
    return Scaling(config.number("lora_alpha", above=0), _of_layer(config, "r", module))


def _policy(config: Fields, fork: _Fork, module: str) -> Policy:
    if fork is not _MOLA:
        return Soft()
    return TopK(_of_layer(config, "top_k", module) if config.has("top_k") else _DEFAULT_TOP_K)


def _of_layer(config: Fields, name: str, module: str) -> int:
    """A field that is one whole number, or a list of one for each layer."""
    if not isinstance(config.values.get(name), list):
        return config.integer(name)
    return config.items(name).integer(module.split(".")[1])


def _check_all_used(weights: Weights, fork: _Fork, experts: dict[str, int]) -> None:
    known = {name for stem, count in experts.items() for name in _names(fork, stem, range(count))}
    for name in weights.tensors:
        if name not in known:
            expected = f"{fork.kind}'s router, and lora_A and lora_B of as many experts as it has"
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)


def _names(fork: _Fork, stem: str, experts: Iterable[int]) -> Iterator[str]:
    yield f"{stem}.{fork.router}.weight"
    for e in experts:
        yield f"{stem}.{fork.a.format(e=e)}.weight"
        yield f"{stem}.{fork.b.format(e=e)}.weight"


def _warnings(config: Fields, fork: _Fork) -> tuple[str, ...]:
    if fork is not _MOLA or config.has("top_k"):
        return ()
    return (
        f"top_k is not in adapter_config.json: {_DEFAULT_TOP_K} is assumed, MoLA's default; "
        'add "top_k": a whole number or a list of one for each layer, if it was trained otherwise',
    )
