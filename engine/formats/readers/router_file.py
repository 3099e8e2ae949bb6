"""The routers of a learned mix: a safetensors file beside its `molehill_mix.json`."""

import re
from collections.abc import Collection
from pathlib import Path

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import ConfigError, MissingTensorError, UnsupportedError
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.transform.learned_gate import SiteRouter

FIELD = "router"
# The tensor that routes every linear that has none of its own.
SHARED = "router"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}\.safetensors")


def read(directory: Path, config: Fields, limits: Limits) -> Weights:
    """The file that `router` names. Raises ConfigError, UnsupportedError, and as
    `files.read_tensors` does."""
    name, where = config.text(FIELD), f"{config.where}: {FIELD}"
    expected = "a .safetensors file beside this one, by letters, digits, `.`, `_` and `-`"
    if name is None:
        raise config.error(FIELD, expected)
    if not _NAME.fullmatch(name):
        raise UnsupportedError(where, ascii(name)[:80], expected)
    path = directory / name
    if path.is_symlink():
        raise UnsupportedError(where, f"{name}, a link", "a file")
    if not path.is_file():
        raise ConfigError(where, f"{name}, no file", expected)
    return files.read_tensors(path, limits)


def by_site(weights: Weights, sites: Collection[str]) -> dict[str, SiteRouter]:
    """`<site>.router` for each site, else `router`. Raises MissingTensorError, ShapeError where one
    is no matrix, UnsupportedError for a tensor that routes nothing."""
    names = {site: _name(weights, site) for site in sites}
    unused = weights.tensors.keys() - set(names.values())
    if unused:
        expected = f"`<linear>.router` of a linear that is adapted, or `{SHARED}`"
        raise UnsupportedError(weights.where(min(unused)), "a tensor that routes nothing", expected)
    return {
        site: SiteRouter(weights.tensor(name, 2), weights.where(name))
        for site, name in names.items()
    }


def _name(weights: Weights, site: str) -> str:
    name = f"{site}.router"
    if name in weights.tensors:
        return name
    if SHARED not in weights.tensors:
        expected = f"one, or `{SHARED}` for all linears that have none"
        raise MissingTensorError(weights.where(name), "no such tensor", expected)
    return SHARED
