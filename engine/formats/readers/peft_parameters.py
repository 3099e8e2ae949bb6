"""LoRA on the fused experts of Transformers 5, as PEFT's `target_parameters` writes it.

A block's experts are two parameters, `gate_up_proj` `[E, 2 I, d]` and `down_proj` `[E, d, I]`. PEFT
wraps them one in the other, so that the file names neither: `...mlp.experts.lora_A.weight`
`[E r, in]` (expert by expert), `.lora_B.weight` `[out, r E]` (the expert is the last index, or the
first: `expert_layout`), and the same at `...mlp.experts.base_layer`. Which
is which follows from the shapes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from molehill.engine.adapter.errors import MissingTensorError, ShapeError, UnsupportedError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.module_names import canonical
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import expert_layout
from molehill.engine.formats.readers.lowrank import Pair, Scaling
from molehill.engine.formats.readers.targeting import suffixes
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_INNER = ".base_layer"


@dataclass(frozen=True)
class Stack:
    """One parameter's pair as the file names and holds it: a `[E r, in]`, b `[out, r E]`."""

    where: str
    a: Tensor
    b: Tensor


def is_stack(module: str) -> bool:
    """Whether a module of the file is a block's experts, and not a linear."""
    return module.removesuffix(_INNER).endswith(".experts")


def read_targets(config: Fields) -> list[str]:
    """Names that the adapted parameters end with, each `gate_up_proj` or `down_proj` of some block.

    Raises ConfigError, UnsupportedError.
    """
    names = config.texts("target_parameters")
    for name in names:
        if name not in (_GATE_UP, _DOWN) and not name.endswith((f".{_GATE_UP}", f".{_DOWN}")):
            expected = f"{_GATE_UP} or {_DOWN} of a block's experts"
            raise UnsupportedError(f"{config.where}: target_parameters", name, expected)
    return names


def adapted(config: Fields) -> set[str]:
    """The parameters that `target_parameters` names in any block. Raises as `read_targets`."""
    return {name.rpartition(".")[2] for name in read_targets(config)}


def settle_layout(directory: Path, config: Fields, given: Layout | None) -> Fields:
    """The config with the layout that somebody names as the adapter is loaded, if anybody does.

    Raises ConfigError where it contradicts the config's, or is missing from a file of Unsloth's;
    UnsupportedError without fused experts.
    """
    settled = expert_layout.with_given(config, given)
    expert_layout.check_said(directory, settled, adapted(settled))
    return settled


def warnings(config: Fields) -> tuple[str, ...]:
    """An order of columns means nothing without fused experts."""
    if not config.has(expert_layout.FIELD) or config.values.get("target_parameters"):
        return ()
    return (f"{config.where}: {expert_layout.FIELD} without fused experts has no effect",)


def read(
    config: Fields,
    weights: Weights,
    modules: Mapping[str, Pair],
    scaling_of: Callable[[str], Scaling],
) -> dict[str, LinearMixture]:
    """Static mixtures by site, gate and up of a fused pair with the same A.

    modules: the file's names of A and B by its names of modules. scaling_of: by
    `{block}.{parameter}`. Raises ConfigError, MissingTensorError, ShapeError, UnsupportedError.
    """
    names, layouts = read_targets(config), expert_layout.read(config)
    blocks = sorted({module.removesuffix(_INNER) for module in modules})
    if names and not blocks:
        expected = f"some for {sorted(adapted(config))}"
        raise MissingTensorError(weights.file, "no tensors of experts", expected)
    sites = {}
    for block in blocks:
        wanted = _wanted(block, names)
        if not wanted:
            where, found = weights.where(block), "tensors of fused experts"
            raise UnsupportedError(where, found, "target_parameters that name them")
        stacks = [
            Stack(weights.where(name), weights.tensor(pair.a, 2), weights.tensor(pair.b, 2))
            for name in (block, block + _INNER)
            if (pair := modules.get(name))
        ]
        if len(stacks) != len(wanted):
            found = f"{len(stacks)} pairs"
            raise MissingTensorError(
                weights.where(block), found, f"one for each of {sorted(wanted)}"
            )
        for parameter, stack in _assign(stacks, wanted).items():
            scaling = scaling_of(f"{block}.{parameter}")
            sites.update(_split(block, parameter, stack, scaling, layouts.of(parameter)))
    return sites


def _wanted(block: str, names: Iterable[str]) -> set[str]:
    """The parameters of one block that are adapted: those whose names end so, as PEFT matches."""
    return {
        parameter
        for parameter in (_GATE_UP, _DOWN)
        if not set(suffixes(f"{block}.{parameter}")).isdisjoint(names)
    }


def _assign(stacks: list[Stack], wanted: set[str]) -> dict[str, Stack]:
    """By shapes: what gate_up reads is what down writes, and it writes twice what down reads."""
    if len(stacks) == 1:
        return {next(iter(wanted)): stacks[0]}
    for gate_up, down in (stacks, stacks[::-1]):
        if (gate_up.a.shape[1], gate_up.b.shape[0]) == (down.b.shape[0], 2 * down.a.shape[1]):
            return {_GATE_UP: gate_up, _DOWN: down}
    found = [(list(stack.a.shape), list(stack.b.shape)) for stack in stacks]
    raise ShapeError(stacks[0].where, found, f"pairs of {_GATE_UP} and {_DOWN}")


def _split(
    block: str, parameter: str, stack: Stack, scaling: Scaling, layout: Layout
) -> dict[str, LinearMixture]:
    rows, rank = stack.a.shape[0], scaling.rank
    if rows % rank or stack.b.shape[1] != rows:
        expected = f"as many rows as columns, a multiple of the rank {rank}"
        raise ShapeError(stack.where, [list(stack.a.shape), list(stack.b.shape)], expected)
    experts = rows // rank
    a = stack.a.view(experts, rank, -1)
    b = _by_expert(stack.b * scaling.factor, experts, layout)
    sites = {}
    for e in range(experts):
        parts = {_DOWN: b[e]}
        if parameter == _GATE_UP:
            gate, up = b[e].chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        for name, own in parts.items():
            pair = Experts(a[e].clone(), own.contiguous(), (rank,))
            site = canonical(f"{block}.{e}.{name}")
            sites[site] = LinearMixture(pair, Constant((1.0,)))
    return sites


def _by_expert(b: Tensor, experts: int, layout: Layout) -> Tensor:
    """`[out, columns]` to `[E, out, r]`."""
    if layout == "grouped_by_expert":
        return b.view(b.shape[0], experts, -1).transpose(0, 1)
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1)
