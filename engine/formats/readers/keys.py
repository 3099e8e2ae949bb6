"""The names that trainers give the tensors of one adapter, read as PEFT's own.

PEFT writes `base_model.model.{module}.lora_A.weight`. RULES is the table of what else is seen in
public files and says the same.
"""

import re
from dataclasses import dataclass

from molehill.engine.adapter import modalities
from molehill.engine.adapter.errors import CorruptFileError, UnsupportedError
from molehill.engine.formats.io.fields import shortened
from molehill.engine.formats.io.files import Weights

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Rule:
    """what: the part of a name, in words. pattern: finds it. replacement: what it is read as."""

    what: str
    pattern: re.Pattern[str]
    replacement: str


ADAPTER_NAME = Rule(
    "the adapter's name",
    # A number is an expert's, and GateL a part of MOELoRA's gate.
    re.compile(
        r"(\.lora_\w+)\.(?P<adapter>(?!(?:\d+|weight|bias|GateL)\b)[\w-]+)(?=\.(?:weight|bias)$|$)"
    ),
    r"\1",
)
RULES = (
    Rule(
        "wrappers of training (DDP, FSDP, torch.compile, checkpointing)",
        re.compile(
            r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
        ),
        "",
    ),
    Rule("lora_down", re.compile(r"\.lora_down(?=\.)"), ".lora_A"),
    Rule("lora_up", re.compile(r"\.lora_up(?=\.)"), ".lora_B"),
    ADAPTER_NAME,
    Rule(
        f"no leading {PREFIX[:-1]}",
        re.compile(r"^(?=(?:model\.|language_model\.|transformer\.)*(?:layers|h)\.\d+\.)"),
        PREFIX,
    ),
    Rule(
        "the language model of a multimodal one",
        re.compile(
            r"(?<=^base_model\.model\.)((?:model\.)*language_model\.(?:model\.)*)(?=layers\.)"
        ),
        r"\1",
    ),
)


_OTHER_MODALITY = re.compile(
    rf"^{re.escape(PREFIX)}(?:model\.)*(?P<part>{'|'.join(modalities.NAMES)})\."
)


def canonical(weights: Weights) -> Weights:
    """The tensors by PEFT's names, with a note for each rule that was needed.

    Raises CorruptFileError for two names that come to one, and for tensors of two adapters;
    UnsupportedError for those of a part of a multimodal base that reads no tokens.
    """
    _check_one_adapter(weights)
    originals: dict[str, str] = {}
    notes: dict[str, str] = {}
    for name in weights.tensors:
        new, applied = _renamed(name)
        if modality := _OTHER_MODALITY.match(new):
            part = modality["part"]
            expected = f"an adapter of the language model, whose target_modules leave out {part}"
            raise UnsupportedError(weights.where(name), modalities.REFUSAL, expected)
        if new in originals:
            where, other = weights.where(name), shortened(originals[new])
            raise CorruptFileError(where, f"the same tensor as {other}", "each once")
        originals[new] = name
        for what in applied:
            note = f"{weights.file}: names with {what}: {shortened(name)} is read as {new[:200]}"
            notes.setdefault(what, note)
    return Weights(
        weights.file,
        {new: weights.tensors[name] for new, name in originals.items()},
        {new: name for new, name in originals.items() if new != name},
        (*weights.notes, *notes.values()),
    )


def _renamed(name: str) -> tuple[str, list[str]]:
    """The name, and what of the file's was read in another way."""
    applied = []
    for rule in RULES:
        name, count = rule.pattern.subn(rule.replacement, name)
        if count:
            applied.append(rule.what)
    return name, applied


def _check_one_adapter(weights: Weights) -> None:
    first: str | None = None
    for name in weights.tensors:
        match = ADAPTER_NAME.pattern.search(name)
        if match is None:
            continue
        first = first or match["adapter"]
        if match["adapter"] != first:
            found = f"tensors of the adapters {first} and {match['adapter']}"
            raise CorruptFileError(weights.where(name), found, "those of one adapter")
