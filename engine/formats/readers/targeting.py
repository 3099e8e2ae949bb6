"""Which modules a config of PEFT's adapts: the rule of PEFT's `check_target_module_exists`.

PEFT drops the tensors of all other modules without a word, so a file that holds some contradicts
its config.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.model import natural_key
from molehill.engine.adapter.module_names import canonical, split_layer
from molehill.engine.formats.io.fields import Fields, shortened
from molehill.engine.formats.readers.patterns import Clock, Pattern

_ALL_LINEAR = "all-linear"
# The first number that follows a name, as PEFT finds a layer where no `layers_pattern` says how.
_ANY_LAYERS = r".*?\.[^.]*"


def suffixes(module: str) -> Iterable[str]:
    """`a.b.c`, `b.c` and `c` of `a.b.c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


class Names:
    """Modules by what their names end with.

    A name that has a layer's number is also the same module's in a model with other surroundings:
    `model.language_model.layers.0.mlp.up_proj` is `layers.0.mlp.up_proj`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._sites = frozenset(site for site in map(canonical, names) if split_layer(site))

    def __contains__(self, module: str) -> bool:
        return not self._names.isdisjoint(suffixes(module)) or canonical(module) in self._sites

    def has_whole(self, module: str) -> bool:
        """Whether a name is the module's whole one, and not only its end."""
        if module in self._names:
            return True
        return canonical(module) in self._sites and self._names.isdisjoint(suffixes(module))


class Targeting:
    """targets: what a module's name must end with, or a pattern; None where the trainer chose by
    the model's architecture, which is not in the file."""

    def __init__(self, config: Fields) -> None:
        """Raises ConfigError, UnsupportedError."""
        self._config, self._clock = config, Clock()
        self._targets = self._names(_target_modules(config), "target_modules")
        self._excluded = self._names(config.values.get("exclude_modules"), "exclude_modules")
        self._saved = [
            self._pattern("modules_to_save", rf"(^|.*\.){name}($|\..*)", name)
            for name in config.texts("modules_to_save")
        ]
        self._layers = _layers(config)
        self._layer_patterns = self._read_layer_patterns()
        if self._layers is not None and isinstance(self._targets, Pattern):
            expected = "none beside a pattern in target_modules, as PEFT demands"
            raise config.error("layers_to_transform", expected)

    def check(self, file: str, modules: Iterable[str]) -> None:
        """modules: as PEFT knows them, the tensors' names less `base_model.model.`.

        Raises UnsupportedError for the first that is not adapted, LimitError for a slow pattern.
        """
        for module in sorted(modules, key=natural_key):
            field = self.against(module)
            if field is not None:
                value = shortened(self._config.values.get(field))
                expected = f"none, as {field} is {value}"
                raise UnsupportedError(
                    f"{file}: {module}", "tensors of an untargeted module", expected
                )

    def against(self, module: str) -> str | None:
        """The field by which a module is not adapted; None if it is. Raises LimitError."""
        if self._excluded is not None and _named(module, self._excluded):
            return "exclude_modules"
        if any(pattern.match(module) for pattern in self._saved):
            return "modules_to_save"
        if self._targets is None:
            # PEFT then adapts those parameters alone.
            parameters = self._config.values.get("target_parameters")
            return None if parameters is None else "target_modules"
        if not _named(module, self._targets):
            return "target_modules"
        if isinstance(self._targets, Pattern) or self._layers is None:
            return None
        if self._targets.has_whole(module):
            return None
        layer = self._layer(module)
        if layer is None and self._config.values.get("layers_pattern"):
            return "layers_pattern"
        return None if layer in self._layers else "layers_to_transform"

    def warnings(self) -> tuple[str, ...]:
        """A `layers_pattern` by itself does nothing; PEFT's newer versions refuse it."""
        if not self._config.values.get("layers_pattern") or self._layers is not None:
            return ()
        where = self._config.where
        return (f"{where}: layers_pattern without layers_to_transform has no effect",)

    def _layer(self, module: str) -> int | None:
        matches = (pattern.match(module) for pattern in self._layer_patterns)
        match = next(filter(None, matches), None)
        return None if match is None else int(match["idx"])

    def _read_layer_patterns(self) -> list[Pattern]:
        value = self._config.values.get("layers_pattern")
        names = [value] if isinstance(value, str) else self._config.texts("layers_pattern")
        patterns = {name: rf"(?:^|.*?\.){name}" for name in names if name}
        whole = patterns or {_ANY_LAYERS: _ANY_LAYERS}
        return [
            self._pattern("layers_pattern", rf"{pattern}\.(?P<idx>\d{{1,9}})\.", name)
            for name, pattern in whole.items()
        ]

    def _names(self, value: Any, field: str) -> Names | Pattern | None:
        """A set of suffixes, a pattern, or None for nothing."""
        if value is None:
            return None
        if isinstance(value, str):
            if value.lower() == _ALL_LINEAR:
                return None
            return self._pattern(field, value, value)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._config.error(field, "a list of module names, or a pattern")
        return Names(value)

    def _pattern(self, field: str, pattern: str, shown: str) -> Pattern:
        """shown: the part that the config holds."""
        return Pattern(f"{self._config.where}: {field}", pattern, self._clock, shown)


def _named(module: str, names: Names | Pattern) -> bool:
    if isinstance(names, Pattern):
        return names.fullmatch(module)
    return module in names


def _target_modules(config: Fields) -> Any:
    """MoE-PEFT also writes {suffix: whether}."""
    value = config.values.get("target_modules")
    if not isinstance(value, Mapping):
        return value
    if not all(isinstance(is_target, bool) for is_target in value.values()):
        raise config.error("target_modules", "true or false for each module")
    return [name for name, is_target in value.items() if is_target]


def _layers(config: Fields) -> Collection[int] | None:
    """Those of `layers_to_transform`; None for all."""
    value = config.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise config.error("layers_to_transform", "a whole number, or a list of them")
    return frozenset(layers)
