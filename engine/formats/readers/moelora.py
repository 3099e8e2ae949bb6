"""MOELoRA (arXiv 2310.18339) as its authors' fork of PEFT writes it.

Keys, with E experts, T tasks and embeddings of d numbers:

    base_model.model.model.layers.{i}.{block}.{proj}.
        lora_A.loraA.{e}.mlp.weight, lora_B.loraB.{e}.mlp.weight   [r // E, in], [out, r // E]
        lora_A.loraA.{e}.weight, lora_B.loraB.{e}.weight           the same tensors by another name
        lora_task_embedding.weight, lora_gate.GateL.weight         [T + 1, d], [E, d]
    lora_task_embedding.weight, lora_gate.GateL.weight             the same shapes

The gate weights go by task: softmax(GateL embedding[task]). With `peft_type` MMOELORAS, the
authors', one gate is shared by all linears, and those of the linears are not used; with MMOELORA
each linear has its own. The config's `r` is the rank of all experts together.
"""

import re

import torch

from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import is_finite
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, linears, peft, saved_modules
from molehill.engine.formats.readers.linears import EXPERT, STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant

_TASKS, _GATE = "lora_task_embedding.weight", "lora_gate.GateL.weight"
_EXPERT = rf"lora_(?P<half>[AB])\.lora(?P=half)\.(?P<e>{EXPERT})"
_COPY = re.compile(rf"(?P<first>.+\.{_EXPERT})\.weight")
_KEY = re.compile(rf"{STEM}\.(?:{_EXPERT}\.mlp\.weight|{re.escape(_TASKS)}|{re.escape(_GATE)})")
_LAYOUT = PartNames(
    "moelora",
    _GATE,
    "lora_A.loraA.{e}.mlp.weight",
    "lora_B.loraB.{e}.mlp.weight",
    (_TASKS,),
)
_SHARED = "MMOELORAS"


def read(files: AdapterFiles) -> Adapter:
    """The adapter of one task. Raises an AdapterError for whatever cannot be served exactly."""
    config, task = files.config, files.task
    if task is None:
        raise UnsupportedError(
            f"{config.where}: peft_type",
            f"{config.values['peft_type']} (MOELoRA), whose gate weights go by a task that no "
            "request names",
            "a copy for one task: molehill convert SRC DST --task N",
        )
    config.refuse(peft.FORKS_UNSERVED)
    peft.check_initialisation(config)
    whole = _without_copies(files.weights)
    tensors = {name: t for name, t in whole.tensors.items() if name not in (_TASKS, _GATE)}
    weights = Weights(whole.file, tensors)
    notes = saved_modules.check(config, weights)
    expected = "loraA, loraB, a task embedding or a gate of a layer's linear"
    stems = linears.find_stems(weights, _KEY, expected)
    warnings = linears.check_targets(config, weights, stems, files.base)
    shared = config.values["peft_type"] == _SHARED
    sites = {
        module: _mixture(config, whole, stem, "" if shared else f"{stem}.", task)
        for module, stem in stems.items()
    }
    experts = {stems[module]: mixture.num_experts for module, mixture in sites.items()}
    linears.check_all_used(weights, _LAYOUT, experts)
    notes += known.warnings(config, known.FIELDS["moelora"])
    return Adapter("moelora", sites, config.text("base_model_name_or_path"), warnings + notes)


READER = Reader(PEFT_FILES, read, peft_types=("MMOELORA", _SHARED), by_task=True)


def _without_copies(weights: Weights) -> Weights:
    """The tensors less the second name of each. Raises CorruptFileError if two are not the same."""
    kept = dict(weights.tensors)
    for name in weights.tensors:
        match = _COPY.fullmatch(name)
        first = f"{match['first']}.mlp.weight" if match else None
        if first is None or first not in weights.tensors:
            continue
        if not torch.equal(weights.tensors[first], kept.pop(name)):
            raise CorruptFileError(weights.where(name), "other values", f"those of {first}")
    return Weights(weights.file, kept)


def _mixture(config: Fields, weights: Weights, stem: str, gate: str, task: int) -> LinearMixture:
    """gate: what the names of its gate and its task embedding begin with."""
    constant = _gate_weights(weights, f"{gate}{_TASKS}", f"{gate}{_GATE}", task)
    count, total = len(constant), config.integer("r")
    if config.has("expert_num") and config.integer("expert_num") != count:
        expected = f"expert_num {config.integer('expert_num')}"
        raise ShapeError(weights.where(f"{gate}{_GATE}"), f"{count} experts", expected)
    if total % count:
        raise config.error("r", f"a multiple of expert_num, {count}: the rank of all together")
    rank = total // count
    # alpha is divided by the rank of all.
    scaling = Scaling(config.number("lora_alpha", above=0) * rank / total, rank)
    experts = build_experts(weights, _LAYOUT.pairs(stem, count), scaling)
    return LinearMixture(experts, Constant(constant))


def _gate_weights(weights: Weights, tasks: str, gate: str, task: int) -> tuple[float, ...]:
    embeddings, rows = weights.tensor(tasks, 2), weights.tensor(gate, 2)
    if embeddings.shape[1] != rows.shape[1]:
        raise ShapeError(
            weights.where(gate), list(rows.shape), [rows.shape[0], embeddings.shape[1]]
        )
    if task >= len(embeddings):
        raise ConfigError("task", task, f"0 to {len(embeddings) - 1}, the rows of {tasks}")
    gate_weights = torch.softmax(rows @ embeddings[task], dim=0)
    if not is_finite(gate_weights):
        raise NonFiniteError(weights.where(gate), f"NaN or Inf for task {task}", "finite weights")
    return tuple(gate_weights.tolist())
