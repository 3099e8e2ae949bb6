"""Initialisations of LoRA that change the base weights, beside which the adapter was then trained.

W' = W - B0 A0 with the pair (A0, B0) that training began with, scaled as the adapter's. The file
holds neither W' nor that pair, so it is served as it is where the base is W' already (PiSSA's
residual models, LoftQ's quantised ones), which somebody has to say, and is converted for W once
(`molehill.engine.formats.convert.original_base`).
"""

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats.io.fields import Fields, shortened

FIELD = "base_is_residual"
OPTION = "--base-is-residual"

_INITIALISATION = "init_lora_weights"
# Those that leave the base weights as they are.
_HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# What B0 A0 can be computed from, by the beginning of the name. `pissa_niter_` is before `pissa`.
_FROM_START = "`molehill convert --initial DIR SRC DST`, DIR the adapter as it was before training"
_FROM_BASE = "`molehill convert --base MODEL SRC DST`, MODEL the base that it was trained from"
_REMEDIES = {
    "pissa_niter_": f"{_FROM_START}, as its decomposition is a random one",
    "pissa": _FROM_BASE,
    "olora": _FROM_BASE,
    "corda": f"{_FROM_START}, as it hangs on training data",
    "lora_ga": f"{_FROM_START}, as it hangs on training data",
    "loftq": "nothing that converts it: the base was quantised",
}


def changes_base(config: Fields) -> bool:
    return _name(config) not in _HARMLESS


def with_residual(config: Fields, changes: bool) -> Fields:
    """The config, with what somebody says of the base as the adapter is loaded.

    changes: whether the adapter was trained beside another base; raises UnsupportedError if not.
    """
    if not changes:
        initialisation = shortened(config.values.get(_INITIALISATION))
        expected = f"false, as {_INITIALISATION} ({initialisation}) leaves the base as it is"
        raise UnsupportedError(FIELD, True, expected)
    return Fields(config.where, {**config.values, FIELD: True})


def warning(field: str, value: object) -> str:
    """Of an adapter that is read for the base as it was in training."""
    return f"{field} is {shortened(value)}: right only on the base as it was in training"


def check(config: Fields) -> tuple[str, ...]:
    """Warnings; raises UnsupportedError for an adapter that was trained beside another base than
    the one that it names, unless that one is served."""
    if not changes_base(config):
        return ()
    if config.flag(FIELD):
        return (warning(_INITIALISATION, config.values.get(_INITIALISATION)),)
    initialisation = shortened(config.values.get(_INITIALISATION))
    raise UnsupportedError(
        f"{config.where}: {_INITIALISATION}",
        f"{initialisation}, which changes the base weights",
        f"an initialisation that leaves them alone, or {_remedy(config)}; or, where the base that "
        f'is served is the changed one, "{FIELD}": true as it is loaded ({OPTION} of molehill\'s '
        "commands)",
    )


def _remedy(config: Fields) -> str:
    name = str(_name(config))
    remedies = (text for start, text in _REMEDIES.items() if name.startswith(start))
    return next(remedies, "one that molehill knows")


def _name(config: Fields) -> object:
    value = config.values.get(_INITIALISATION)
    return value.lower() if isinstance(value, str) else value
