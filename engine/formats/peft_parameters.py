"""LoRA on the fused experts of Transformers 5, as PEFT's `target_parameters` writes it.

A block's experts are two parameters, `gate_up_proj` `[E, 2 I, d]` and `down_proj` `[E, d, I]`. PEFT
wraps them one in the other, so that the file names neither: `...mlp.experts.lora_A.weight`
`[E r, in]` (expert by expert), `.lora_B.weight` `[out, r E]` (the expert is the last index), and
the same at `...mlp.experts.base_layer`. Which is which follows from the shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from molehill.engine.errors import MissingTensorError, ShapeError, UnsupportedError
from molehill.engine.formats.fields import Fields
from molehill.engine.formats.files import Weights
from molehill.engine.formats.lowrank import Pair, Scaling
from molehill.engine.moe import canonical
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


def read_targets(config: Fields) -> set[str]:
    """The parameters that are adapted: `gate_up_proj`, `down_proj`, both or none.

    Raises ConfigError, UnsupportedError.
    """
    names = config.values.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise config.error("target_parameters", "a list of parameter names")
    for name in names:
        if name not in (_GATE_UP, _DOWN) and not name.endswith((f".{_GATE_UP}", f".{_DOWN}")):
            expected = f"{_GATE_UP} or {_DOWN} of a block's experts"
            raise UnsupportedError(f"{config.where}: target_parameters", name, expected)
    return {name.rpartition(".")[2] for name in names}


def read(
    weights: Weights,
    modules: Mapping[str, Pair],
    wanted: set[str],
    scaling_of: Callable[[str], Scaling],
) -> dict[str, LinearMixture]:
    """Static mixtures by site, gate and up of a fused pair with the same A.

    modules: the file's names of A and B by its names of modules. scaling_of: by
    `{block}.{parameter}`. Raises MissingTensorError, ShapeError, UnsupportedError.
    """
    blocks = sorted({module.removesuffix(_INNER) for module in modules})
    if blocks and not wanted:
        where, found = weights.where(blocks[0]), "tensors of fused experts"
        raise UnsupportedError(where, found, "target_parameters that name them")
    if wanted and not blocks:
        raise MissingTensorError(
            weights.file, "no tensors of experts", f"some for {sorted(wanted)}"
        )
    sites = {}
    for block in blocks:
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
            sites.update(_split(block, parameter, stack, scaling_of(f"{block}.{parameter}")))
    return sites


def _assign(stacks: list[Stack], wanted: set[str]) -> dict[str, Stack]:
    """By shapes: what gate_up reads is what down writes, and it writes twice what down reads."""
    if len(stacks) == 1:
        return {next(iter(wanted)): stacks[0]}
    for gate_up, down in (stacks, stacks[::-1]):
        if (gate_up.a.shape[1], gate_up.b.shape[0]) == (down.b.shape[0], 2 * down.a.shape[1]):
            return {_GATE_UP: gate_up, _DOWN: down}
    found = [(list(stack.a.shape), list(stack.b.shape)) for stack in stacks]
    raise ShapeError(stacks[0].where, found, f"pairs of {_GATE_UP} and {_DOWN}")


def _split(block: str, parameter: str, stack: Stack, scaling: Scaling) -> dict[str, LinearMixture]:
    rows, rank = stack.a.shape[0], scaling.rank
    if rows % rank or stack.b.shape[1] != rows:
        expected = f"as many rows as columns, a multiple of the rank {rank}"
        raise ShapeError(stack.where, [list(stack.a.shape), list(stack.b.shape)], expected)
    experts = rows // rank
    a = stack.a.view(experts, rank, -1)
    b = (stack.b * scaling.factor).view(-1, rank, experts)
    sites = {}
    for e in range(experts):
        parts = {_DOWN: b[:, :, e]}
        if parameter == _GATE_UP:
            gate, up = b[:, :, e].chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        for name, own in parts.items():
            pair = Experts(a[e].clone(), own.contiguous(), (rank,))
            site = canonical(f"{block.removeprefix('model.')}.{e}.{name}")
            sites[site] = LinearMixture(pair, Constant((1.0,)))
    return sites
