"""The weights of a base model on disk, one by one."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from molehill.engine.adapter.errors import UnknownTargetError, UnsupportedError
from molehill.engine.adapter.expert_sites import canonical

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def directory_of(model: str) -> Path:
    """The directory of a model that is one, or is in the local cache. Raises OSError."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, local_files_only=True))


def shards(base: Path) -> list[str]:
    """The names of a checkpoint's files of weights.

    Raises UnsupportedError for a quantised one, or one without safetensors, OSError.
    """
    config = json.loads((base / "config.json").read_text())
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UnsupportedError("config.json: quantization_config", method, "unquantised weights")
    if (base / _INDEX).exists():
        names = json.loads((base / _INDEX).read_text())["weight_map"].values()
        return sorted(set(names))
    if (base / _WHOLE).exists():
        return [_WHOLE]
    raise UnsupportedError(base, "no safetensors checkpoint", f"{_WHOLE} or {_INDEX}")


class Checkpoint:
    """A directory as Transformers saves it. Raises as `shards` does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By canonical name, the file and the tensor's name in it.
        self._places: dict[str, tuple[str, str]] = {}
        for shard in shards(directory):
            with safe_open(directory / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name.endswith(".weight"):
                        site = canonical(name.removeprefix("model.").removesuffix(".weight"))
                        self._places[site] = shard, name

    def weight(self, site: str) -> Tensor:
        """`[out, in]` as it is stored, of a linear by its canonical name. Raises
        UnknownTargetError."""
        if site not in self._places:
            found = f"no weight of it in {self._directory.name}"
            raise UnknownTargetError(site, found, "one in the base's checkpoint")
        shard, name = self._places[site]
        with safe_open(self._directory / shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
