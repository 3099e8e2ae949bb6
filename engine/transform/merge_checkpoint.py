"""A base checkpoint with an adapter merged into its weights."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from molehill.engine.adapter.errors import UnknownTargetError, UnsupportedError
from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head, is_on_vocabulary
from molehill.engine.hf.checkpoint import shards as shards_of
from molehill.engine.hf.shapes import canonical_name
from molehill.engine.system.atomic_directory import appearing
from molehill.engine.transform.merge import check_mergeable, is_plain, merged_weight, why_not_plain
from molehill.kernels.mixture import Bias, LinearMixture

# Weights in other files would be those of the base, unmerged.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


def merge_checkpoint(base: Path, adapter: Adapter, directory: Path) -> dict[str, float]:
    """Writes `base` with W + B A (m / ||W + B A|| * (W + B A) with DoRA) to a new directory.

    adapter: fits the base, and its sites are plain or DoRA, as `merge_static` leaves them. Sums are
    float32, rounded once to the weight's dtype. Shards keep their names and tensors; config and
    tokenizer are copied. Biases go into the base's. Returns the relative change
    ||W' - W|| / ||W|| by site.

    Raises UnsupportedError (a dynamic site, an activated adapter; a quantised base, or one without
    safetensors; the embedding or the head of a base that ties them; a bias at a linear that has
    none), UnknownTargetError (a site whose weight no shard has), FileExistsError, OSError.
    """
    check_mergeable(adapter, "adapter")
    sites = _sites(adapter)
    shards = shards_of(base)
    _check_untied(base, shards, sites)
    changes: dict[str, float] = {}
    biases = dict(adapter.biases)
    with appearing(directory) as partial:
        for shard in shards:
            with safe_open(base / shard, framework="pt") as file:
                metadata = file.metadata()
            tensors = safetensors.torch.load_file(base / shard)
            changes.update(_merge(tensors, sites))
            _merge_biases(tensors, biases)
            safetensors.torch.save_file(tensors, partial / shard, metadata)
        for site in sites:
            if site not in changes:
                found = f"no weight of it in {', '.join(shards)}"
                raise UnknownTargetError(site, found, "one in the base's checkpoint")
        if biases:
            found = "a bias, and the base's linear has none: its config makes no place for one"
            expected = "a base with biases there; unmerged, molehill serves it on any"
            raise UnsupportedError(f"{min(biases)}.bias", found, expected)
        for file_path in base.iterdir():
            if file_path.is_file() and file_path.suffix not in _OTHER_WEIGHTS:
                shutil.copyfile(file_path, partial / file_path.name)
    return changes


def _sites(adapter: Adapter) -> dict[str, LinearMixture]:
    result = {}
    for site in adapter.rows:
        raise UnsupportedError(site, "rows of its own", "low-rank pairs alone")
    for site in sorted(adapter.sites, key=natural_key):
        mixture = adapter.sites[site]
        if not isinstance(mixture, LinearMixture) or not (is_plain(mixture) or _is_dora(mixture)):
            raise UnsupportedError(site, why_not_plain(mixture), "a static site")
        result[site] = mixture
    return result


def _check_untied(base: Path, shards: Sequence[str], sites: Collection[str]) -> None:
    """A checkpoint without a head of its own has one weight for both."""
    on_vocabulary = [site for site in sites if is_on_vocabulary(site)]
    if not on_vocabulary:
        return
    for shard in shards:
        with safe_open(base / shard, framework="pt") as file:
            if any(is_head(canonical_name(n.removesuffix(".weight"))) for n in file.keys()):  # noqa: SIM118
                return
    found = "one weight for the embedding and the LM head, of which one is adapted or both apart"
    raise UnsupportedError(on_vocabulary[0], found, "a base whose weights are not tied")


def _is_dora(mixture: LinearMixture) -> bool:
    return mixture.magnitude is not None


def _merge(tensors: dict[str, Tensor], sites: Mapping[str, LinearMixture]) -> dict[str, float]:
    """Changes the weights of `sites` among a shard's tensors; the relative change of each."""
    changes = {}
    for name, weight in tensors.items():
        site = canonical_name(name.removesuffix(".weight"))
        if site in sites and name.endswith(".weight"):
            if is_embedding(site):
                tensors[name] = merged_weight(weight.T, sites[site]).T.contiguous()
            else:
                tensors[name] = merged_weight(weight, sites[site])
            before = weight.float()
            changes[site] = float((tensors[name].float() - before).norm() / before.norm())
    return changes


def _merge_biases(tensors: dict[str, Tensor], biases: dict[str, Bias]) -> None:
    """Writes the biases of linears among a shard's tensors, and takes them out of `biases`."""
    for name, tensor in tensors.items():
        site = canonical_name(name.removesuffix(".bias"))
        if name.endswith(".bias") and site in biases:
            whole = biases.pop(site).whole(tensor)
            assert whole is not None
            tensors[name] = whole.to(tensor.dtype)
