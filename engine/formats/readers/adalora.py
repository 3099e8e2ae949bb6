"""AdaLoRA (arXiv 2303.10512) as PEFT writes it: a LoRA with a third factor, its ranks pruned.

Keys: `{linear}.lora_A` [r, in], `.lora_E` [r, 1], `.lora_B` [out, r]; r differs by linear, and may
be 0. y = W x + alpha / (init_r + 1e-5) * B (E * A) x, as PEFT computes it: whatever was pruned, the
divisor stays the rank that training began with.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from molehill.engine.adapter.errors import MissingTensorError, ShapeError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import peft, tuner_linears
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.engine.formats.readers.tuner_linears import TunedLinears

_PARTS = ("lora_A", "lora_B", "lora_E")
_EPSILON = 1e-5

# `rank_pattern` is AdaLoRA's own here; nothing in PEFT's AdaLoRA reads the others.
_UNREAD = {
    "alora_invocation_tokens": "an activated LoRA",
    "alpha_pattern": "scalings by pattern",
    "lora_bias": "a bias in lora_B",
    "target_parameters": "AdaLoRA on fused experts",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scaling",
}


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config, weights = files.config, files.weights
    config.refuse({**peft.UNSERVED, **_UNREAD})
    factor = _factor(config)
    tuned = tuner_linears.find(config, weights, "adalora", _PARTS)
    _check_rank_pattern(config, weights, tuned)
    pairs, pruned = {}, 0
    for site, stem in tuned.stems.items():
        pair = _pair(weights, stem, factor)
        pruned += pair is None
        if pair is not None:
            pairs[site] = pair
    sites = tuner_linears.plain(_rows(pairs), files.limits)
    notes = tuned.warnings
    if pruned:
        notes += (f"{pruned} of {len(tuned.stems)} linears have no rank left: as the base there",)
    base = config.text("base_model_name_or_path")
    return Adapter("adalora", sites, base, notes, biases=tuned.biases)


READER = Reader(PEFT_FILES, read, peft_types=("ADALORA",))


def _rows(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for site, (a, b) in pairs.items():
        yield site, a, b


def _factor(config: Fields) -> float:
    """PEFT takes an alpha that is not above 0 as the rank."""
    rank, alpha = config.integer("init_r"), config.number("lora_alpha")
    return (alpha if alpha > 0 else rank) / (rank + _EPSILON)


def _pair(weights: Weights, stem: str, factor: float) -> tuple[Tensor, Tensor] | None:
    """A and B, without the ranks that E switches off; None if none is left."""
    names = [f"{stem}.{part}" for part in ("lora_A", "lora_E", "lora_B")]
    for name in names:
        if name not in weights.tensors:
            raise MissingTensorError(weights.where(name), "no such tensor", "one")
    a_name, e_name, b_name = names
    rank = weights.tensors[e_name].shape[0] if weights.tensors[e_name].ndim == 2 else -1
    for name, axis, width in ((a_name, 0, None), (e_name, 0, 1), (b_name, 1, None)):
        shape = list(weights.tensors[name].shape)
        if len(shape) != 2 or shape[axis] != rank or (width and shape[1] != width):
            expected = f"2 dimensions, of rank {rank} as {e_name} [rank, 1] has"
            raise ShapeError(weights.where(name), shape, expected)
    if rank == 0:
        return None
    a, e, b = (weights.tensor(name, 2) for name in names)
    kept = e[:, 0] != 0
    return ((a * e)[kept], b[:, kept] * factor) if bool(kept.any()) else None


def _check_rank_pattern(config: Fields, weights: Weights, tuned: TunedLinears) -> None:
    """What was kept of each linear, `{module}.lora_E` to booleans: PEFT cannot load a file whose
    ranks are others. Raises ConfigError, ShapeError."""
    kept = config.object("rank_pattern")
    stems = {tuned.name_in_model(site): stem for site, stem in tuned.stems.items()}
    for name, flags in kept.values.items():
        if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
            raise kept.error(name, "a list of true and false")
        stem = stems.get(name.removesuffix(".default").removesuffix(".lora_E"))
        e = weights.tensors.get(f"{stem}.lora_E")
        if e is not None and e.ndim == 2 and e.shape[0] != sum(flags):
            where, expected = weights.where(f"{stem}.lora_E"), f"rank {sum(flags)}, as rank_pattern"
            raise ShapeError(where, f"rank {e.shape[0]}", expected)
