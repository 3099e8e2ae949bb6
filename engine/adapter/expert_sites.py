"""Names of what an adapter changes in a mixture-of-experts base model.

Expert e of the block `layers.{i}.mlp` is adapted at `layers.{i}.mlp.experts.{e}.gate_proj`,
`.up_proj` and `.down_proj`, each a static linear mixture; the block's router at
`layers.{i}.mlp.gate`. Mixtral's, Granite's and Gemma's names are others.
"""

import re
from typing import NamedTuple

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_MIXTRAL_BLOCK = "block_sparse_moe"
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Between a layer and its experts: what vLLM and older files have in Gemma 4.
_MOE = re.compile(r"\.moe\.experts(?=\.|$)")
# Granite's and gpt-oss's, which others call gate.
_ROUTER = re.compile(r"(\.mlp)\.router(?:\.layer)?$")
_SITE = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>0|[1-9]\d*)\.(?P<projection>\w+)")


class ExpertSite(NamedTuple):
    """`layers.3.mlp`, 5, `up_proj` of the site `layers.3.mlp.experts.5.up_proj`."""

    block: str
    expert: int
    projection: str


def canonical(name: str) -> str:
    """`layers.3.block_sparse_moe.experts.5.w3` to `layers.3.mlp.experts.5.up_proj`, and so with a
    router's name; all others as they are."""
    parts = ["mlp" if part == _MIXTRAL_BLOCK else part for part in name.split(".")]
    if split(name) is not None:
        parts[-1] = _MIXTRAL.get(parts[-1], parts[-1])
    return _ROUTER.sub(r"\1.gate", _MOE.sub(".experts", ".".join(parts)))


def split(site: str) -> ExpertSite | None:
    """The parts of an expert's site; None for any other name."""
    match = _SITE.fullmatch(site)
    return match and ExpertSite(match["block"], int(match["expert"]), match["projection"])
