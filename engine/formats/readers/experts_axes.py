"""Which axis of a fused parameter lora_A reads, on the experts of a mixture-of-experts base.

A parameter `[E, out, in]` (`gate_up_proj` `[E, 2 I, d]`, `down_proj` `[E, d, I]`) has the pair
A `[E r, in]`, B `[out, E r]` since PEFT 0.19. Before, PEFT took its second axis for the inputs:
A `[E r, out]`, B `[in, E r]`, and expert e's delta is (B_e A_e)^T. Newer versions of PEFT refuse
such files. `peft_version` says which it is, and so do the shapes of two pairs in one block, and the
base's; they must agree.

What the base holds as `[E, in, out]` (gpt-oss) has A `[E r, in]`, B `[out, E r]` from PEFT before
0.19, and later where Transformers says of the module that it `is_transposed`; else the two are
swapped. No file tells which, so the base's widths do (`fit`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

from torch import Tensor

from molehill.engine.adapter.base_model import Moe
from molehill.engine.adapter.errors import ConfigError, ShapeError
from molehill.engine.formats.io.fields import Fields

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_FIELD = "peft_version"
_CHANGED_IN = (0, 19)


@dataclass(frozen=True)
class Stack:
    """One parameter's pair as the file names and holds it: a `[E r, in]`, b `[out, r E]`; where
    swapped, a `[E r, out]`, b `[in, r E]`."""

    where: str
    a: Tensor
    b: Tensor
    swapped: bool = False


def assign(stacks: list[Stack], parameters: Collection[str], config: Fields) -> dict[str, Stack]:
    """The stacks of one block by their parameters, which follow from the shapes of two.

    parameters: adapted ones, as many as stacks. Raises as `orient`.
    """
    if len(stacks) == 1:
        return orient({next(iter(parameters)): stacks[0]}, config)
    for order in permutations(stacks):
        assigned = dict(zip((_GATE_UP, _DOWN), order, strict=True))
        if _is_plain(assigned) or _is_swapped(assigned):
            return orient(assigned, config)
    raise _no_pair(stacks)


def fit(stacks: list[Stack], parameters: Collection[str], block: Moe) -> dict[str, Stack]:
    """The stacks of a block that the base holds as `[E, in, out]`, by their parameters.

    parameters: adapted ones, as many as stacks. One that fits both ways is read as PEFT reads it
    beside a module that `is_transposed`. Raises ShapeError for one that fits neither way.
    """
    inner = block.intermediate
    widths = {_GATE_UP: (block.hidden, 2 * inner), _DOWN: (inner, block.hidden)}
    names = [name for name in (_GATE_UP, _DOWN) if name in parameters]
    for swapped in (False, True):
        for order in permutations(stacks):
            ends = [_ends(stack)[:: -1 if swapped else 1] for stack in order]
            if ends == [widths[name] for name in names]:
                assigned = zip(names, order, strict=True)
                return {name: replace(stack, swapped=swapped) for name, stack in assigned}
    expected = ", ".join(f"{name} from {ins} to {outs}" for name, (ins, outs) in widths.items())
    raise _no_pair(stacks, expected)


def orient(stacks: Mapping[str, Stack], config: Fields) -> dict[str, Stack]:
    """The stacks with what `peft_version` says of them. stacks: of one block, by parameter.

    Raises ConfigError where it contradicts the shapes, or is missing where nothing else tells;
    ShapeError for shapes of no pair.
    """
    declared = _declared(config)
    if len(stacks) == 1:
        (stack,) = stacks.values()
        if declared is None and stack.a.shape[1] == stack.b.shape[0]:
            expected = f"the version of PEFT that wrote it, as {stack.where} is square"
            raise config.error(_FIELD, expected)
        swapped = bool(declared)
    elif _is_swapped(stacks):
        swapped = True
    elif _is_plain(stacks):
        swapped = False
    else:
        raise _no_pair(list(stacks.values()))
    if declared is not None and declared != swapped:
        found = f"{config.values[_FIELD]!r} beside lora_A of {_layout(swapped)}"
        expected = f"the version that wrote it, or lora_A of {_layout(declared)}"
        raise ConfigError(f"{config.where}: {_FIELD}", found, expected)
    return {name: replace(stack, swapped=swapped) for name, stack in stacks.items()}


def _declared(config: Fields) -> bool | None:
    """Whether the version is one before the change; None if there is none."""
    version = config.text(_FIELD)
    match = re.match(r"(\d{1,4})\.(\d{1,4})", version or "")
    if version is not None and match is None:
        raise config.error(_FIELD, "a version, as 0.19.0")
    return None if match is None else (int(match[1]), int(match[2])) < _CHANGED_IN


def _layout(swapped: bool) -> str:
    version = ".".join(map(str, _CHANGED_IN))
    return f"PEFT before {version}" if swapped else f"PEFT {version} and later"


def _is_plain(stacks: Mapping[str, Stack]) -> bool:
    """What gate_up reads is what down writes, and it writes twice what down reads."""
    gate_up, down = stacks[_GATE_UP], stacks[_DOWN]
    return _ends(gate_up) == (down.b.shape[0], 2 * down.a.shape[1])


def _is_swapped(stacks: Mapping[str, Stack]) -> bool:
    gate_up, down = stacks[_GATE_UP], stacks[_DOWN]
    return _ends(gate_up)[::-1] == (down.a.shape[1], 2 * down.b.shape[0])


def _ends(stack: Stack) -> tuple[int, int]:
    """Columns of A, rows of B."""
    return stack.a.shape[1], stack.b.shape[0]


def _no_pair(
    stacks: Collection[Stack], expected: str = f"pairs of {_GATE_UP} and {_DOWN}"
) -> ShapeError:
    found = [(list(stack.a.shape), list(stack.b.shape)) for stack in stacks]
    return ShapeError(next(iter(stacks)).where, found, expected)
