"""MoV (arXiv 2309.05444): mixtures of (IA)^3 vectors, in the layout of tests/data/golden.

No published files exist: the method's authors work with T5X checkpoints. Keys:
`mov.layers.{i}.{block}.{proj}.` with `router.weight` `[E, width]` and `mov_scaling`
`[heads, E, width]` (multiplies the projection's output, head by head) or `[E, in]` (its input).
"""

import re
from dataclasses import dataclass

from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, saved_modules, targets
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import ScaleMixture
from molehill.kernels.policy import Soft

_KEY = re.compile(
    r"mov\.(?P<module>layers\.(?:0|[1-9]\d{0,4})\.\w+(?:\.\w+)?)\.(?:router\.weight|mov_scaling)"
)


@dataclass(frozen=True)
class _Names:
    """The names, in the file, of one module's tensors."""

    router: str
    vectors: str


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config = files.config
    config.refuse({"top_k": "top-k routing"})
    target_modules = targets.read_targets(config)
    weights = files.weights
    modules = _modules(weights)
    targets.check_targeted(weights.file, modules, target_modules)
    targets.check_every_layer(weights.file, modules, files.base)
    sites = {module: _mixture(config, weights, names) for module, names in modules.items()}
    base_model = config.text("base_model_name_or_path")
    warnings = targets.unused(target_modules, modules) + saved_modules.check(config, weights)
    warnings += known.warnings(config, known.FIELDS["mov"])
    return Adapter("mov", sites, base_model, warnings)


READER = Reader(PEFT_FILES, read, peft_types=("MOV",))


def _modules(weights: Weights) -> dict[str, _Names]:
    modules: dict[str, _Names] = {}
    for key in weights.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "router.weight or mov_scaling of a layer's linear"
            raise UnsupportedError(weights.where(key), "an unknown tensor", expected)
        stem = f"mov.{match['module']}"
        modules[match["module"]] = _Names(f"{stem}.router.weight", f"{stem}.mov_scaling")
    return modules


def _mixture(config: Fields, weights: Weights, names: _Names) -> ScaleMixture:
    router = weights.tensor(names.router, 2)
    experts, width = router.shape
    if config.has("num_experts") and config.integer("num_experts") != experts:
        expected = f"num_experts {config.integer('num_experts')}"
        raise ShapeError(weights.where(names.router), f"{experts} experts", expected)
    of_input = names.vectors in weights.tensors and weights.tensors[names.vectors].ndim == 2
    vectors = weights.tensor(names.vectors, 2 if of_input else 3)
    if list(vectors.shape[-2:]) != [experts, width]:
        expected = f"{[experts, width]}, the router's" + ("" if of_input else ", for each head")
        raise ShapeError(weights.where(names.vectors), list(vectors.shape), expected)
    if of_input:
        return ScaleMixture(vectors.unsqueeze(0), Soft(), router, "input")
    return ScaleMixture(vectors, Soft(), router)
