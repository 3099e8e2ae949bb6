"""MiSS (arXiv 2409.15371) as PEFT writes it, and Bone, as it was called until PEFT 0.18.

Keys: `{linear}.miss_block` (`.bone_block`) [r, out]. The input's blocks of r are added up, the last
one filled with zeros, and multiplied by the block: a low-rank pair whose B is the block and whose
A, `[r, in]`, is made of identities side by side. With `init_weights` "mini" the block is
[r, mini_r] and repeats along the outputs. With "bat" it multiplies W's own blocks: no low rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.formats.readers.tuner_linears import TunedLinears

_MISSING = "how wide a linear's input is"


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config = files.config
    kind = str(config.values["peft_type"]).lower()
    if config.values.get("init_weights") == "bat":
        found = "bat, whose blocks multiply W's own: W + W B + B is of full rank"
        expected = "true, false or mini, which are low-rank pairs"
        raise UnsupportedError(f"{config.where}: init_weights", found, expected)
    linears = tuner_linears.find(config, files.weights, kind, (f"{kind}_block",))
    sites = tuner_linears.plain(_pairs(files, linears, f"{kind}_block"), files.limits)
    base = config.text("base_model_name_or_path")
    return Adapter(kind, sites, base, linears.warnings, biases=linears.biases)


READER = Reader(PEFT_FILES, read, peft_types=("MISS", "BONE"), expands=True)


def _pairs(
    files: AdapterFiles, linears: TunedLinears, part: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    config, weights = files.config, files.weights
    rank = config.integer("r")
    for site, stem in linears.stems.items():
        name = f"{stem}.{part}"
        block = weights.tensor(name, 2)
        inputs, outputs = tuner_linears.base_shape(files, site, _MISSING)
        width = _width(config, outputs)
        if list(block.shape) != [rank, width]:
            raise ShapeError(weights.where(name), list(block.shape), [rank, width])
        tuner_linears.check_rank(weights.where(name), rank, "the config's", files.limits)
        a = (torch.arange(inputs) % rank == torch.arange(rank)[:, None]).float()
        yield site, a, block.repeat(1, outputs // width).T


def _width(config: Fields, outputs: int) -> int:
    """Columns of the block."""
    if config.values.get("init_weights") != "mini":
        return outputs
    width = config.integer("mini_r")
    if outputs % width:
        raise config.error("mini_r", f"a divisor of {outputs}, a linear's outputs")
    return width
