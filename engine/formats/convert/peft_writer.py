"""A plain LoRA in the files of Hugging Face PEFT: adapter_config.json, adapter_model.safetensors.

Any PEFT reader takes it: PEFT itself, vLLM's own LoRA, molehill. alpha equals the rank everywhere,
for scalings are in B already.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head
from molehill.engine.formats.io import files
from molehill.engine.formats.readers import invocation, vocabulary
from molehill.engine.system.atomic_directory import appearing
from molehill.engine.transform.merge import check_one, plain_sites, why_not_plain
from molehill.kernels.mixture import Experts


def write_lora(adapter: Adapter, directory: Path) -> None:
    """Writes an adapter of plain low-rank pairs, as `merge_static` leaves them, to a new directory.

    Biases that it adds are written as `lora_bias`, which PEFT has on every module or on none: zeros
    on the others. Raises UnsupportedError for the first site that is something else,
    FileExistsError.
    """
    pairs, added = _pairs(adapter), _added_biases(adapter)
    with appearing(directory) as partial:
        tensors = {}
        for site, experts in pairs.items():
            a, b = vocabulary.PARTS[is_embedding(site)]
            tensors[f"base_model.model.{_module(site)}.{a}"] = experts.a.contiguous()
            tensors[f"base_model.model.{_module(site)}.{b}"] = experts.b.contiguous()
            if added and not is_embedding(site):
                bias = added.get(site, experts.b.new_zeros(experts.b.shape[0]))
                tensors[f"base_model.model.{_module(site)}.lora_B.bias"] = bias.contiguous()
        safetensors.torch.save_file(tensors, partial / files.SAFETENSORS, {"format": "pt"})
        (partial / files.CONFIG).write_text(json.dumps(_config(adapter, pairs), indent=2))


def _pairs(adapter: Adapter) -> dict[str, Experts]:
    check_one(adapter, "adapter")
    for site in adapter.rows:
        raise UnsupportedError(site, "rows of its own", "one low-rank pair, as a plain LoRA has")
    plain = plain_sites(adapter)
    for site in sorted(adapter.sites, key=natural_key):
        if site not in plain:
            found = why_not_plain(adapter.sites[site])
            raise UnsupportedError(site, found, "one low-rank pair, as a plain LoRA has")
    return plain


def _module(site: str) -> str:
    """As Transformers calls it in most models."""
    return site if is_head(site) else f"model.{site}"


def _added_biases(adapter: Adapter) -> dict[str, Tensor]:
    added = {}
    for site, bias in adapter.biases.items():
        if bias.added is None or bias.trained is not None:
            found = "a trained bias of the base, which a merged LoRA has no place for"
            expected = "bias 'none', or --into-base, which writes it into the base's checkpoint"
            raise UnsupportedError(f"{site}.bias", found, expected)
        if site not in adapter.sites:
            found, expected = "a bias without a low-rank pair", "both, as a plain LoRA has"
            raise UnsupportedError(f"{site}.bias", found, expected)
        added[site] = bias.added
    return added


def _config(adapter: Adapter, pairs: dict[str, Experts]) -> dict[str, Any]:
    """The most frequent rank is `r`, the others are exceptions by module."""
    ranks = {_module(site): experts.ranks[0] for site, experts in pairs.items()}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(adapter.biases),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(pairs),
        invocation.FIELD: list(adapter.invocation_tokens) or None,
    }
