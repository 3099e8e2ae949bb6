"""The base's own weights on the vocabulary, read from its checkpoint's files."""

import json
from pathlib import Path
from typing import Any, Literal

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


def vocabulary_tensor(
    model: str, site: str, tied: bool, part: Literal["weight", "bias"] = "weight"
) -> Tensor:
    """The weight `[tokens, hidden]` of the embedding or the LM head, or the head's bias `[tokens]`,
    in the checkpoint's dtype.

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
            stem, _, leaf = name.rpartition(".")
            if leaf == part and canonical(stem) == wanted:
                with safe_open(directory / file, framework="pt") as opened:
                    tensor: Tensor = opened.get_tensor(name)
                if not tensor.is_floating_point() or tensor.ndim != (2 if part == "weight" else 1):
                    found = f"{tensor.dtype} {list(tensor.shape)}"
                    raise UnsupportedError(where, found, expected)
                return tensor
    raise UnsupportedError(where, f"no {part} of it", expected)


def _files(directory: Path) -> dict[str, str]:
    """The file of each tensor. Raises OSError, ValueError."""
    if (directory / INDEX).exists():
        index: dict[str, Any] = json.loads((directory / INDEX).read_text())
        return dict(index["weight_map"])
    with safe_open(directory / WHOLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), WHOLE)
