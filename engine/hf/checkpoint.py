"""The files of a base model's checkpoint."""

import json
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from molehill.engine.adapter.base_model import TRANSPOSED
from molehill.engine.adapter.errors import UnknownTargetError, UnsupportedError
from molehill.engine.hf.shapes import canonical_name

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def directory_of(model: str) -> Path:
    """The directory of a model that is one, or is in the local cache. Raises OSError."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, local_files_only=True))


def shards(base: Path) -> list[str]:
    """The names of its safetensors files. Raises UnsupportedError for a quantised base, one whose
    weights are transposed, and one without safetensors; OSError."""
    config = json.loads((base / "config.json").read_text())
    if config.get("model_type") in TRANSPOSED:
        found = f"{config['model_type']}, whose weights are stored as [in, out]"
        raise UnsupportedError("config.json: model_type", found, "weights of [out, in]")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UnsupportedError("config.json: quantization_config", method, "unquantised weights")
    if (base / _INDEX).exists():
        names = json.loads((base / _INDEX).read_text())["weight_map"].values()
        return sorted(set(names))
    if (base / _WHOLE).exists():
        return [_WHOLE]
    raise UnsupportedError(base, "no safetensors checkpoint", f"{_WHOLE} or {_INDEX}")


def linear_weights(base: Path, sites: Collection[str]) -> dict[str, Tensor]:
    """The weights `[out, in]` of these linears, by canonical name, of their own dtype.

    Raises UnknownTargetError for one that no shard has, and as `shards` does.
    """
    files = shards(base)
    weights: dict[str, Tensor] = {}
    for shard in files:
        with safe_open(base / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                site = canonical_name(name.removesuffix(".weight"))
                if site in sites and name.endswith(".weight"):
                    weights[site] = file.get_tensor(name)
    for site in sites:
        if site not in weights:
            text = f"no weight of it in {', '.join(files)}"
            raise UnknownTargetError(site, text, "one in the base's checkpoint")
    return weights
