"""What a file of PEFT's holds of the vocabulary, by module and part.

Keys: `base_model.model.model.embed_tokens.lora_embedding_A` `[r, tokens]`, `.lora_embedding_B`
`[hidden, r]`; `base_model.model.lm_head.lora_A.weight`, `.lora_B.weight`. Beside them PEFT saves
the whole weight that was adapted, `.base_layer.weight`, which is the base's own unless somebody
changed it. With tied weights what is adapted is what has a pair in the file, and the other is the
base's.

Whole modules (`modules_to_save`) are `.weight`, rows of `trainable_token_indices`
`.token_adapter.trainable_tokens_delta` `[n, hidden]`, which are the rows themselves and no deltas.

Where tokens were added to the vocabulary, PEFT saves the whole embedding and the whole head beside
all that, and loads them: `.weight` of one that is not trained, `.base_layer.weight` under a pair,
`.token_adapter.base_layer.weight` under rows. Of one in `modules_to_save` it also saves
`.modules_to_save.weight`, the same as `.weight`, and `.original_module.weight`, the weight before
training; neither changes an answer.
"""

import re
from dataclasses import dataclass, field, replace

from molehill.engine.adapter.errors import CorruptFileError
from molehill.engine.adapter.module_names import AROUND_LAYERS, canonical
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, HEADS
from molehill.engine.formats.io.files import Weights

WHOLE, ROWS_OF_TOKENS = "weight", "token_adapter.trainable_tokens_delta"
# Under a pair, and under rows of tokens.
UNDER_PAIR, UNDER_ROWS = "base_layer.weight", "token_adapter.base_layer.weight"
UNUSED = ("modules_to_save.weight", "original_module.weight")
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>{AROUND_LAYERS}(?:{'|'.join((*EMBEDDINGS, *HEADS))}))"
    r"\.(?P<part>lora_embedding_[AB]|lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|base_layer\.weight|base_layer\.bias|weight|token_adapter\.trainable_tokens_delta"
    r"|token_adapter\.base_layer\.weight|modules_to_save\.weight|original_module\.weight)"
)


@dataclass(frozen=True)
class VocabularyTensors:
    """keys: the names in the file by module and part. rest: all other tensors."""

    rest: Weights
    keys: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def pairs(self) -> list[str]:
        """The modules that have a pair, or parts of one."""
        others = {UNDER_PAIR, "base_layer.bias", WHOLE, ROWS_OF_TOKENS, UNDER_ROWS, *UNUSED}
        return [module for module, keys in self.keys.items() if set(keys) - others]

    def having(self, part: str) -> dict[str, str]:
        """The keys of one part by module."""
        return {module: keys[part] for module, keys in self.keys.items() if part in keys}


def find(weights: Weights) -> VocabularyTensors:
    """Takes apart what is on the vocabulary and what is not. Raises CorruptFileError."""
    keys: dict[str, dict[str, str]] = {}
    for key in weights.tensors:
        match = _KEY.fullmatch(key)
        if match is not None:
            keys.setdefault(match["module"], {})[match["part"]] = key
    sites = [canonical(module) for module in keys]
    if len(sites) != len(set(sites)):
        raise CorruptFileError(weights.where(max(keys)), "two spellings of one module", "one")
    taken = {key for parts in keys.values() for key in parts.values()}
    rest = {key: tensor for key, tensor in weights.tensors.items() if key not in taken}
    return VocabularyTensors(replace(weights, tensors=rest), keys)
