"""Whose the columns of lora_B are, on the fused experts of a mixture-of-experts base.

With E experts of rank r, column j is of expert j % E and its rank j // E as PEFT reads it
(`rank_major`), of expert j // r and its rank j % r as Unsloth trained it before September 2026
(`grouped_by_expert`). Either fits every file, so the bytes do not tell. Newer versions of Unsloth
write `lora_B_layout` into adapter_config.json, and with `unsloth_fused_expert_lora` one for each
parameter; files that Unsloth made before are refused until somebody says which they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.layout import LAYOUTS, Layout
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields

FIELD = "lora_B_layout"
README = "README.md"
README_BYTES = 1 << 20

_DETAIL = "unsloth_fused_expert_lora"
_OPTION = "lora_b_layout"


@dataclass(frozen=True)
class Layouts:
    """What a config says: of all parameters, and of some by name."""

    general: Layout | None
    by_parameter: Mapping[str, Layout]

    def of(self, parameter: str) -> Layout:
        """PEFT's where nothing else is said."""
        return self.by_parameter.get(parameter, self.general or "rank_major")

    def knows(self, parameter: str) -> bool:
        return self.general is not None or parameter in self.by_parameter


def read(config: Fields) -> Layouts:
    """Raises ConfigError for another word, and for one that contradicts another."""
    general = _layout(config, FIELD) if config.has(FIELD) else None
    detail = config.object(_DETAIL)
    detail.choice("lora_A_layout", ("grouped_by_expert",), "grouped_by_expert")
    parameters = detail.object("parameters")
    by_parameter = {name: _layout(parameters.object(name), FIELD) for name in parameters.values}
    for name, layout in by_parameter.items():
        if general is not None and layout != general:
            raise parameters.object(name).error(FIELD, f"{general}, the adapter's {FIELD}")
    return Layouts(general, by_parameter)


def with_given(config: Fields, layout: Layout | None) -> Fields:
    """The config with the layout that somebody names as the adapter is loaded.

    Raises ConfigError if the config says another, UnsupportedError if it has no fused experts.
    """
    if layout is None:
        return config
    if not config.values.get("target_parameters"):
        refuse(layout, "as the adapter has no fused experts (target_parameters)")
    if config.has(FIELD) and config.values[FIELD] != layout:
        raise config.error(FIELD, f"{layout}, the {_OPTION} that was asked for")
    return Fields(config.where, {**config.values, FIELD: layout})


def refuse(layout: Layout | None, reason: str) -> None:
    """Raises UnsupportedError if a layout was named where it means nothing."""
    if layout is not None:
        raise UnsupportedError(_OPTION, layout, f"none, {reason}")


def in_doubt(config: Fields, parameters: Collection[str] = ()) -> bool:
    """Whether the layout hangs on who made the file. parameters: those that it adapts, if known."""
    layouts = read(config)
    if not config.values.get("target_parameters") or layouts.general is not None:
        return False
    return not layouts.by_parameter or not all(map(layouts.knows, parameters))


def needs_readme(directory: Path) -> bool:
    """Whether an adapter's README may tell how it is to be read. Raises ConfigError, LimitError."""
    if not (directory / files.CONFIG).exists():
        return False
    return in_doubt(files.read_config(directory))


def check_said(directory: Path, config: Fields, parameters: Collection[str]) -> None:
    """Raises ConfigError for a file of Unsloth's that does not say its layout."""
    sign = _sign_of_unsloth(directory, config) if in_doubt(config, parameters) else None
    if sign is not None:
        expected = (
            f"{' or '.join(LAYOUTS)}: LoRA on fused experts by Unsloth ({sign}) may have either "
            "order of lora_B's columns, its bytes do not tell which, and the wrong one mixes up "
            "the experts. Unsloth's own code read it as grouped_by_expert until September 2026, "
            f"PEFT reads it as rank_major. Say which by {FIELD} in {config.where}, or by {_OPTION} "
            "as it is loaded (--lora-b-layout of molehill's commands)"
        )
        raise config.error(FIELD, expected)


def _layout(config: Fields, name: str) -> Layout:
    word = config.choice(name, LAYOUTS)
    return next(layout for layout in LAYOUTS if layout == word)


def _sign_of_unsloth(directory: Path, config: Fields) -> str | None:
    """What tells that Unsloth made a file, or None."""
    mapping, base = config.values.get("auto_mapping"), config.text("base_model_name_or_path") or ""
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        return "auto_mapping.unsloth_fixed"
    if base.lower().startswith("unsloth/"):
        return "its base_model_name_or_path"
    if b"unsloth" in files.read_start(directory / README, README_BYTES).lower():
        return f"its {README}"
    return None
