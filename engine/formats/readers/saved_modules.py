"""What PEFT may save beside an adapter's own tensors: whole modules."""

from collections.abc import Collection

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats.io.fields import Fields, shortened
from molehill.engine.formats.io.files import Weights

_FIELD = "modules_to_save"


def check(config: Fields, weights: Weights, served: Collection[str] = ()) -> tuple[str, ...]:
    """Warnings of what the config names and the file does not hold, for it changes nothing.

    served: modules whose tensors are read by others.

    Raises ConfigError; UnsupportedError where the file holds a whole module.
    """
    names = config.texts(_FIELD)
    modules = [f".{name}" for name in weights.tensors if "lora_" not in name]
    absent: list[str] = []
    for name in dict.fromkeys(names):
        if any(f".{name}." in module for module in modules):
            expected = "the field absent, or no tensors for it"
            raise UnsupportedError(f"{config.where}: {_FIELD}", f"whole modules ({name})", expected)
        if not any(f".{module}".endswith(f".{name}") for module in served):
            absent.append(name)
    warnings = []
    if absent:
        warnings.append(
            f"{_FIELD} is {shortened(absent)}, but there are no tensors for it: no effect"
        )
    return tuple(warnings)
