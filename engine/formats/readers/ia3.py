"""(IA)^3 (arXiv 2205.05638) as PEFT writes it: one vector for each linear.

Keys: `{linear}.ia3_l`, [out, 1] where it multiplies the output, bias included, [1, in] where it
multiplies the input (`feedforward_modules`).
"""

from typing import Literal

from molehill.engine.adapter.errors import ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import ScaleMixture
from molehill.kernels.policy import Soft

_PARTS = ("ia3_l",)


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    tuned = tuner_linears.find(config, weights, "ia3", _PARTS)
    sites = {
        site: _vector(config, weights, tuned.name_in_model(site), f"{stem}.ia3_l")
        for site, stem in tuned.stems.items()
    }
    return Adapter("ia3", sites, config.text("base_model_name_or_path"), tuned.warnings)


READER = Reader(PEFT_FILES, read, peft_types=("IA3",))


def _vector(config: Fields, weights: Weights, module: str, name: str) -> ScaleMixture:
    """A mixture of one vector, whose router has nothing to choose."""
    vector = weights.tensor(name, 2)
    rows, columns = vector.shape
    of_input = columns != 1
    if of_input and rows != 1:
        expected = "[out, 1] for a linear's output, [1, in] for its input"
        raise ShapeError(weights.where(name), list(vector.shape), expected)
    if isinstance(config.values.get("feedforward_modules"), list):
        named = any(module.endswith(leaf) for leaf in config.texts("feedforward_modules"))
        if named != of_input:
            expected = "[1, in]" if named else "[out, 1]"
            why = f"{expected}, as feedforward_modules {'has' if named else 'has not'} this module"
            raise ShapeError(weights.where(name), list(vector.shape), why)
    whole = vector.reshape(1, 1, -1)
    return ScaleMixture(whole, Soft(), whole.new_zeros(1, whole.shape[2]), _of(of_input))


def _of(of_input: bool) -> Literal["output", "input"]:
    return "input" if of_input else "output"
