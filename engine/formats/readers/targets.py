"""What `target_modules` promises, held against the modules that a file has tensors for."""

from collections.abc import Collection, Iterable, Mapping

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import MissingTensorError, UnsupportedError
from molehill.engine.adapter.module_names import canonical, split_layer, without_surroundings
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers.targeting import Targeting, suffixes


def read_targets(config: Fields) -> list[str] | None:
    """Module suffixes; None if `target_modules` is a pattern or absent. Raises ConfigError.

    MoE-PEFT also writes {suffix: whether}.
    """
    value = config.values.get("target_modules")
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, Mapping):
        if not all(isinstance(is_target, bool) for is_target in value.values()):
            raise config.error("target_modules", "true or false for each module")
        value = [name for name, is_target in value.items() if is_target]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise config.error("target_modules", "a list of module names")
    return value


def check_targeted(file: str, modules: Iterable[str], targets: list[str] | None) -> None:
    """A trainer ignores the tensors of a module that is no target. Raises UnsupportedError."""
    if targets is None:
        return
    named = frozenset(targets)
    for module in modules:
        if named.isdisjoint(suffixes(module)):
            expected = f"one of target_modules {', '.join(targets)}"
            raise UnsupportedError(f"{file}: {module}", "tensors of an untargeted module", expected)


def check_siblings(
    file: str, modules: Iterable[str], targeting: Targeting, base: BaseModel | None
) -> None:
    """A projection adapted in one layer is adapted in every layer where its parent block is, unless
    the config takes it out there.

    `self_attn` with q and v in most layers and q alone in one means lost tensors, where the base
    has v there: layers that share a KV cache have none, and layers of hybrids are of several kinds.
    modules: as PEFT knows them. Raises MissingTensorError.
    """
    children: dict[str, set[str]] = {}
    blocks: dict[tuple[int, str], set[str]] = {}
    prefixes: dict[tuple[int, str], str] = {}
    for module in modules:
        split = split_layer(without_surroundings(module))
        if split is not None:
            layer, (block, _, child) = split[0], split[1].rpartition(".")
            children.setdefault(block, set()).add(child)
            blocks.setdefault((layer, block), set()).add(child)
            prefixes[layer, block] = module.removesuffix(child)
    for (layer, block), present in sorted(blocks.items()):
        for child in sorted(children[block] - present):
            name = prefixes[layer, block] + child
            if base is not None and base.linear(canonical(name)) is None:
                continue
            if targeting.against(name) is None:
                _raise_missing(file, without_surroundings(name))


def check_every_layer(file: str, modules: Iterable[str], base: BaseModel | None) -> None:
    """MoE-PEFT adapts each target in every layer that has it, from 0 to the last: in every layer
    of a base that nobody named. Raises MissingTensorError."""
    present = set(modules)
    split = [part for part in map(split_layer, present) if part is not None]
    last = max((layer for layer, _ in split), default=-1)
    paths = {path for _, path in split}
    if base is not None:
        _check_layers_of(base, file, {canonical(module) for module in present}, paths, last)
        return
    if last + 1 > len(present):
        missing = next(i for i in range(last) if not any(layer == i for layer, _ in split))
        _raise_missing(file, f"layers.{missing}")
    for path in sorted(paths):
        for layer in range(last + 1):
            if f"layers.{layer}.{path}" not in present:
                _raise_missing(file, f"layers.{layer}.{path}")


def _check_layers_of(
    base: BaseModel, file: str, present: Collection[str], paths: Collection[str], last: int
) -> None:
    """Layers of hybrids are of several kinds, with other linears."""
    for site in base.linears:
        part = split_layer(site)
        if part is not None and part[0] <= last and part[1] in paths and site not in present:
            _raise_missing(file, site)


def _raise_missing(file: str, module: str) -> None:
    raise MissingTensorError(
        f"{file}: {module}", "no tensors", "some, as other layers have for this target"
    )


def unused(targets: list[str] | None, modules: Collection[str]) -> tuple[str, ...]:
    """A warning for each target that the file has no tensors for; trainers ignore unknown names."""
    present = {suffix for module in modules for suffix in suffixes(module)}
    sites = {canonical(module) for module in modules}
    return tuple(
        f"target_modules names {target}, but there are no tensors for it"
        for target in targets or ()
        if target not in present and canonical(target) not in sites
    )
