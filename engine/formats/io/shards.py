"""The index of an adapter whose tensors are split over several safetensors files.

`{"weight_map": {tensor: file}}`, as Transformers writes it for models, beside the files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from molehill.engine.adapter.errors import ConfigError, LimitError, UnsupportedError
from molehill.engine.formats.io.fields import Fields, shortened

INDEX = "adapter_model.safetensors.index.json"

_MOST_FILES = 1000
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Index:
    """weight_map: the file of each tensor, by the tensor's name."""

    weight_map: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        """Each file once."""
        return list(dict.fromkeys(self.weight_map.values()))


def parse(document: Fields) -> Index:
    """Raises ConfigError, LimitError, UnsupportedError for a file that is not right beside it."""
    weight_map = document.object("weight_map")
    if not weight_map.values:
        raise document.error("weight_map", "an object of a file for each tensor")
    for name, file in weight_map.values.items():
        where = f"{weight_map.where}: {name[:200]}"
        if not isinstance(file, str):
            raise ConfigError(where, shortened(file), "a file's name")
        if not _FILE.fullmatch(file):
            expected = "a .safetensors file beside the index"
            raise UnsupportedError(where, shortened(file), expected)
    index = Index(weight_map.values)
    if len(index.files) > _MOST_FILES:
        raise LimitError(document.where, f"{len(index.files)} files", f"at most {_MOST_FILES}")
    return index
