"""Adapters as trainers send them: the files of a directory in a form."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from support.api_client import Api, copy_adapter

Files = list[tuple[str, tuple[str, bytes]]]


def safetensors_of(case: str, folder: Path) -> Path:
    """A golden adapter whose tensors are in safetensors, if its trainer pickled them."""
    copy_adapter(case, folder)
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        tensors = torch.load(pickled, weights_only=True)
        save_file({name: t.contiguous() for name, t in tensors.items()}, weights(folder))
        pickled.unlink()
    return folder


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def split(folder: Path) -> None:
    """Its tensors in two shards and an index."""
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    index = {}
    for number in range(2):
        file = f"adapter_model-{number + 1:05}-of-00002.safetensors"
        shard = dict(list(tensors.items())[number::2])
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / f"{weights(folder).name}.index.json").write_text(json.dumps({"weight_map": index}))


def files_of(folder: Path) -> Files:
    """As the field `file` of a form, by paths below the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [("file", (str(path.relative_to(folder)), path.read_bytes())) for path in paths]


def upload(api: Api, files: Iterable[Any], fields: Mapping[str, str]) -> httpx.Response:
    return api.http.post("/v1/adapters", data=dict(fields), files=list(files))


def uploads_left(store: Path) -> list[Path]:
    """What lies in a store of bodies that are on their way, or were."""
    return list(store.glob(".upload-*"))
