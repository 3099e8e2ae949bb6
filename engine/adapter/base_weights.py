"""The base's own weights on the vocabulary, read from its checkpoint's files."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.module_names import canonical
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, is_head

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def directory_of(model: str) -> Path:
    """The directory of a model that is one, or is in the local cache. Raises OSError."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, local_files_only=True))


def vocabulary_weight(model: str, site: str, tied: bool) -> Tensor:
    """The weight `[tokens, hidden]` of the embedding or the LM head, in the checkpoint's dtype.

    model: a directory, or a name in the local cache. tied: whether the head's may be the
    embedding's. Raises UnsupportedError where it cannot be read.
    """
    expected = "a base whose safetensors hold it, to compare with"
    where = f"{site} of the base model"
    try:
        directory = directory_of(model)
        files = _files(directory)
    except (OSError, ValueError):
        raise UnsupportedError(where, "no safetensors that can be read", expected) from None
    sites = (site, *EMBEDDINGS) if is_head(site) and tied else (site,)
    for wanted in sites:
        for name, file in files.items():
            if name.endswith(".weight") and canonical(name.removesuffix(".weight")) == wanted:
                with safe_open(directory / file, framework="pt") as opened:
                    weight: Tensor = opened.get_tensor(name)
                if not weight.is_floating_point() or weight.ndim != 2:
                    found = f"{weight.dtype} {list(weight.shape)}"
                    raise UnsupportedError(where, found, expected)
                return weight
    raise UnsupportedError(where, "no weight of it", expected)


def _files(directory: Path) -> dict[str, str]:
    """The file of each tensor. Raises OSError, ValueError."""
    if (directory / INDEX).exists():
        index: dict[str, Any] = json.loads((directory / INDEX).read_text())
        return dict(index["weight_map"])
    with safe_open(directory / WHOLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), WHOLE)
