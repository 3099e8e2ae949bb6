"""Loads a base model with an adapter merged into its weights (`--merge-into-base`).

The adapter is a directory in the native format whose plain low-rank pairs are merged; the rest of
it is served as any adapter is.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from molehill.engine import formats
from molehill.engine.adapter.base_model import TRANSPOSED, Limits
from molehill.engine.transform.merge import PLAIN, MergedBase, check_mergeable, merged_weight
from molehill.engine.vllm.model import checkpoint_loader
from molehill.engine.vllm.model.projections import canonical
from molehill.kernels.mixture import Experts, LinearMixture

logger = init_logger("vllm.molehill")


def install(
    config: VllmConfig, directory: Path | None, digest: str, limits: Limits
) -> MergedBase | None:
    """Makes this process load the base of `config` with an adapter merged into it; None, and the
    base as it is, without a directory.

    directory: of the adapter's merged copy. digest: of the adapter that it was made of. Raises
    RuntimeError for a base that cannot be merged into, AdapterError for the adapter.
    """
    if directory is None:
        return None
    for refused, what in (
        (config.model_config.quantization is not None, "a quantised base model"),
        (config.speculative_config is not None, "speculative decoding"),
        (
            config.model_config.hf_config.model_type in TRANSPOSED,
            "a base whose weights are stored as [in, out]",
        ),
        (
            config.load_config.load_format not in checkpoint_loader.FORMATS,
            f"another load format than {checkpoint_loader.FORMATS}",
        ),
    ):
        if refused:
            raise RuntimeError(f"merging an adapter into the base weights: found {what}")
    adapter = formats.read(directory, limits)
    check_mergeable(adapter, "merged_base")
    merged_base = MergedBase(adapter, digest)
    checkpoint_loader.add(config, partial(with_merged_base, merged_base.pairs))
    return merged_base


def with_merged_base(
    pairs: Mapping[str, Experts], weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """`weights` with W + B A in the place of each merged W, rounded once, to `dtype`: the served
    one, for a wider one than the checkpoint's would round twice or lose what it can hold.

    Raises RuntimeError for a weight of another shape or kind, and at the end for a merged site that
    no weight was found for: nothing may be subtracted that was not added.
    """
    missing = set(pairs)
    for name, weight in weights:
        site = canonical(name.removesuffix(".weight"))
        if site not in pairs or not name.endswith(".weight"):
            yield name, weight
            continue
        pair = pairs[site]
        expected = [pair.b.shape[0], pair.a.shape[1]]
        if not weight.is_floating_point() or list(weight.shape) != expected:
            found = f"{weight.dtype} {list(weight.shape)}"
            raise RuntimeError(f"{name}: found {found}, expected floating point {expected}")
        missing.discard(site)
        yield name, merged_weight(weight.float(), LinearMixture(pair, PLAIN)).to(dtype)
    if missing:
        raise RuntimeError(f"{min(missing)}: found no weight in the checkpoint to merge into")
    logger.info("molehill: an adapter is merged into %d of the base's linears", len(pairs))
