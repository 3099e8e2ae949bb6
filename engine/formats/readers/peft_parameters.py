"""LoRA on parameters of the base, as PEFT's `target_parameters` writes it.

A block's experts are two parameters, `gate_up_proj` `[E, 2 I, d]` and `down_proj` `[E, d, I]`. PEFT
wraps them one in the other, so that the file names neither: `...mlp.experts.lora_A.weight`
`[E r, in]` (expert by expert), `.lora_B.weight` `[out, r E]` (the expert is the last index, or the
first: `expert_layout`), and the same at `...mlp.experts.base_layer`. Which is which follows from
the shapes. Granite had them apart, as the weights of `input_linear` and `output_linear`; Gemma 4 on
`moe` itself, where now its `experts` are.

Before 0.19 PEFT took the parameter's axes the other way round (`experts_axes`). gpt-oss has gate
and up in turn, output by output, which only the base says.

A `weight` `[out, in]`, such as that of a router (`gate.weight`, which PEFT 0.21 writes for
`all-linear`), is adapted as a linear is.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel, Moe
from molehill.engine.adapter.errors import MissingTensorError, ShapeError, UnsupportedError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.module_names import canonical
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import expert_layout, experts_axes
from molehill.engine.formats.readers.experts_axes import Stack
from molehill.engine.formats.readers.lowrank import PairNames, Scaling
from molehill.engine.formats.readers.targeting import suffixes
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_INNER = ".base_layer"
_NESTED = (".experts", ".moe")
# Modules whose one parameter is a block's, by what Granite calls them.
_APART = {"input_linear": _GATE_UP, "output_linear": _DOWN}
# Granite's shared expert: two linears of the same names.
_SHARED = (".shared_mlp",)
_WEIGHT = ".weight"
# What configs call bases that have gate and up in turn.
_INTERLEAVED = re.compile(r"gpt.?oss", re.IGNORECASE)


def is_stack(module: str) -> bool:
    """Whether a module of the file is a block's experts, and not a linear."""
    name = module.removesuffix(_INNER)
    if name.endswith(tuple(f"{shared}.{leaf}" for shared in _SHARED for leaf in _APART)):
        return False
    return name.endswith((*_NESTED, *(f".{leaf}" for leaf in _APART)))


def is_weight(module: str, names: Collection[str]) -> bool:
    """Whether `target_parameters` names a module's weight. names: as `read_targets` gives them."""
    return not set(suffixes(module + _WEIGHT)).isdisjoint(names)


def read_targets(config: Fields) -> list[str]:
    """Names that the adapted parameters end with: `gate_up_proj` and `down_proj` of some block, and
    weights. Raises ConfigError, UnsupportedError."""
    names = config.texts("target_parameters")
    for name in names:
        if name.rpartition(".")[2] not in (_GATE_UP, _DOWN, "weight"):
            expected = f"{_GATE_UP} or {_DOWN} of a block's experts, or a weight"
            raise UnsupportedError(f"{config.where}: target_parameters", name, expected)
    return names


def adapted(config: Fields) -> set[str]:
    """The parameters of experts that `target_parameters` names. Raises as `read_targets`."""
    parameters = set()
    for name in read_targets(config):
        parent, _, parameter = name.rpartition(".")
        if parameter == "weight":
            parameter = _APART.get(parent.rpartition(".")[2], "")
        parameters.add(parameter)
    return parameters - {""}


def with_layout(directory: Path, config: Fields, given: Layout | None) -> Fields:
    """The config with the layout that somebody names as the adapter is loaded, if anybody does.

    Raises ConfigError where it contradicts the config's, or is missing from a file of Unsloth's;
    UnsupportedError without fused experts.
    """
    config = expert_layout.with_given(config, given)
    if parameters := adapted(config):
        expert_layout.check_said(directory, config, parameters)
    return config


def warnings(config: Fields) -> tuple[str, ...]:
    """An order of columns means nothing without fused experts."""
    if not config.has(expert_layout.FIELD) or config.values.get("target_parameters"):
        return ()
    return (f"{config.where}: {expert_layout.FIELD} without fused experts has no effect",)


def read(
    config: Fields,
    weights: Weights,
    modules: Mapping[str, PairNames],
    scaling_of: Callable[[str], Scaling],
    base: BaseModel | None,
) -> dict[str, LinearMixture]:
    """Static mixtures by site, gate and up of a fused pair with the same A.

    modules: the file's names of A and B by its names of modules. scaling_of: by
    `{block}.{parameter}`. base: what it is read for. Raises ConfigError, MissingTensorError,
    ShapeError, UnsupportedError.
    """
    names, layouts = read_targets(config), expert_layout.read(config)
    if adapted(config) and not modules:
        expected = f"some for {sorted(adapted(config))}"
        raise MissingTensorError(weights.file, "no tensors of experts", expected)
    if modules and base is None:
        _check_order(config)
    sites = {}
    for block, block_modules in _blocks(modules).items():
        sizes = _sizes(block, base)
        stacks = _read_stacks(weights, block, block_modules, names, config, sizes)
        for name, (parameter, stack) in stacks.items():
            pairs = _pairs(stack, scaling_of(name), layouts.of(parameter))
            for e, pair in enumerate(pairs):
                site = f"{_experts(block)}.{e}"
                sites.update(_by_projection(site, parameter, pair, sizes))
    return sites


def _check_order(config: Fields) -> None:
    """Raises UnsupportedError where the order of gate and up hangs on a base that nobody named."""
    mapping = config.values.get("auto_mapping")
    named = [mapping.get("base_model_class")] if isinstance(mapping, Mapping) else []
    named.append(config.text("base_model_name_or_path"))
    for name in filter(None, named):
        if _INTERLEAVED.search(str(name).rstrip("/").rpartition("/")[2]):
            found = f"fused experts of {str(name)[:200]!a}, which may have gate and up in turn"
            expected = (
                "the base model beside it: --model of molehill inspect and merge, --base of "
                "molehill convert (a server knows its own)"
            )
            raise UnsupportedError(f"{config.where}: target_parameters", found, expected)


def _sizes(block: str, base: BaseModel | None) -> Moe | None:
    site = canonical(_experts(block)).removesuffix(".experts")
    return None if base is None else base.moes.get(site)


def _blocks(modules: Mapping[str, PairNames]) -> dict[str, dict[str, PairNames]]:
    """Modules by their block: `...mlp.experts` has itself and its `base_layer`."""
    blocks: dict[str, dict[str, PairNames]] = {}
    for module in sorted(modules):
        parent, _, leaf = module.removesuffix(_INNER).rpartition(".")
        block = parent if leaf in _APART else f"{parent}.{leaf}"
        blocks.setdefault(block, {})[module] = modules[module]
    return blocks


def _read_stacks(
    weights: Weights,
    block: str,
    modules: Mapping[str, PairNames],
    names: Collection[str],
    config: Fields,
    sizes: Moe | None,
) -> dict[str, tuple[str, Stack]]:
    """(parameter, stack) by the parameter's name as PEFT's patterns know it."""
    stacks = {
        module: Stack(weights.where(module), weights.tensor(pair.a, 2), weights.tensor(pair.b, 2))
        for module, pair in modules.items()
    }
    apart = {module: _APART.get(module.rpartition(".")[2]) for module in modules}
    parameter_of = {
        f"{module}{_WEIGHT}": parameter
        for module, parameter in apart.items()
        if parameter is not None and is_weight(module, names)
    }
    parameter_of |= {
        f"{block}.{parameter}": parameter for parameter in _adapted_parameters(block, names)
    }
    if not parameter_of:
        found = "tensors of fused experts"
        raise UnsupportedError(weights.where(block), found, "target_parameters that name them")
    if len(stacks) != len(parameter_of):
        expected = f"one for each of {sorted(parameter_of.values())}"
        raise MissingTensorError(weights.where(block), f"{len(stacks)} pairs", expected)
    if sizes is not None and sizes.interleaved:
        oriented = experts_axes.fit(list(stacks.values()), set(parameter_of.values()), sizes)
    elif None not in apart.values():
        known = {module: str(parameter) for module, parameter in apart.items()}
        oriented = experts_axes.orient({known[module]: stacks[module] for module in known}, config)
    else:
        oriented = experts_axes.assign(list(stacks.values()), set(parameter_of.values()), config)
    return {name: (parameter, oriented[parameter]) for name, parameter in parameter_of.items()}


def _adapted_parameters(block: str, names: Collection[str]) -> set[str]:
    """The parameters of one block that are adapted: those whose names end so, as PEFT matches."""
    return {
        parameter
        for parameter in (_GATE_UP, _DOWN)
        if not set(suffixes(f"{block}.{parameter}")).isdisjoint(names)
    }


def _pairs(stack: Stack, scaling: Scaling, layout: Layout) -> list[Experts]:
    """One for each of the base's experts, the scaling in b."""
    rows, rank = stack.a.shape[0], scaling.rank
    if rows % rank or stack.b.shape[1] != rows:
        expected = f"as many rows as columns, a multiple of the rank {rank}"
        raise ShapeError(stack.where, [list(stack.a.shape), list(stack.b.shape)], expected)
    experts = rows // rank
    a = stack.a.view(experts, rank, -1)
    b = _by_expert(stack.b, experts, layout)
    if stack.swapped:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return [Experts(a[e], b[e] * scaling.factor, (rank,)) for e in range(experts)]


def _by_projection(
    expert: str, parameter: str, pair: Experts, sizes: Moe | None
) -> dict[str, LinearMixture]:
    """The mixtures of one expert by site; of a gate_up_proj, both with its A."""
    parts = {_DOWN: pair.b}
    if parameter == _GATE_UP:
        in_turn = sizes is not None and sizes.interleaved
        gate, up = (pair.b[::2], pair.b[1::2]) if in_turn else pair.b.chunk(2)
        parts = {"gate_proj": gate, "up_proj": up}
    return {
        canonical(f"{expert}.{name}"): LinearMixture(
            Experts(pair.a.clone(), b.contiguous(), pair.ranks), Constant((1.0,))
        )
        for name, b in parts.items()
    }


def _experts(block: str) -> str:
    """`...mlp.experts` of `...mlp.experts`, of `...mlp` with Granite's modules below, and
    `...moe.experts` of `...moe`."""
    return block if block.endswith(".experts") else f"{block}.experts"


def _by_expert(b: Tensor, experts: int, layout: Layout) -> Tensor:
    """`[out, columns]` to `[E, out, r]`."""
    if layout == "grouped_by_expert":
        return b.view(b.shape[0], experts, -1).transpose(0, 1)
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)
