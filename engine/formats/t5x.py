"""MoLoRA out of T5X: the arrays of a JAX checkpoint into a canonical adapter.

The method's authors publish JAX code and no file format of their own; a checkpoint, flattened to
names with slashes, holds for each adapted projection

    {path}/lora_A [E, in, r]    {path}/lora_B [E, r, out]    {path}/.../router/.../kernel [in, E]

y = W x + alpha / r * sum_e p_e (x A_e) B_e with p = softmax(x kernel), arXiv 2309.05444; with top_k
the other p are 0 and the kept ones are not renormalised.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.engine.adapter import Adapter
from molehill.engine.base import Limits
from molehill.engine.errors import (
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.validation import check
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Soft, TopK

DEFAULT_LIMITS = Limits()
DEFAULT_ALPHA = 16.0

Arrays = Mapping[str, NDArray[Any]]


def convert(
    arrays: Arrays,
    modules: Mapping[str, str],
    *,
    alpha: float = DEFAULT_ALPHA,
    top_k: int | None = None,
    base_model: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Adapter:
    """A MoLoRA adapter, of any float dtype, self-consistent and within the limits.

    arrays: by name, as in `numpy.load("checkpoint.npz")`. The base model's own are not looked at.
    modules: where each projection of the checkpoint belongs in the model that is served, as
        {"decoder/layers_0/mlp/wi_lora": "layers.0.mlp.up_proj"}.
    alpha: the code's `alpha`; the rank is the arrays'. top_k: the code's, None for soft mixing.
    Raises ConfigError, LimitError, MissingTensorError, NonFiniteError, NothingBoundError,
    ShapeError, and UnsupportedError (router biases, MoV's vectors, arrays outside `modules`).
    """
    if alpha <= 0:
        raise ConfigError("alpha", alpha, "a number above 0")
    if top_k is not None and top_k < 1:
        raise ConfigError("top_k", top_k, "a whole number of at least 1, or None")
    _check_all_mapped(arrays, modules)
    policy = Soft() if top_k is None else TopK(top_k, normalize=False)
    sites = {}
    for path, module in modules.items():
        if module in sites:
            raise ConfigError(f"modules: {path}", module, "a module that no other path has")
        experts = _experts(arrays, path, alpha)
        sites[module] = LinearMixture(experts, policy, _router(arrays, path, experts))
    adapter = Adapter("molora", sites, base_model)
    check(adapter, limits)
    return adapter


def _check_all_mapped(arrays: Arrays, modules: Mapping[str, str]) -> None:
    for name in arrays:
        path, _, last = name.rpartition("/")
        if last == "mov_scaling":
            raise UnsupportedError(name, "a vector of MoV", "low-rank experts (MoLoRA)")
        if last in ("lora_A", "lora_B") and path not in modules:
            raise UnsupportedError(name, "an adapter's array outside `modules`", "its path there")


def _experts(arrays: Arrays, path: str, alpha: float) -> Experts:
    a, b = _array(arrays, f"{path}/lora_A", 3), _array(arrays, f"{path}/lora_B", 3)
    count, inputs, rank = a.shape
    if b.shape[:2] != (count, rank):
        raise ShapeError(f"{path}/lora_B", list(b.shape), [count, rank, b.shape[2]])
    rows = a.transpose(1, 2).reshape(count * rank, inputs)
    columns = b.reshape(count * rank, b.shape[2]).T * (alpha / rank)
    return Experts(rows.contiguous(), columns.contiguous(), (rank,) * count)


def _router(arrays: Arrays, path: str, experts: Experts) -> Tensor:
    for name in _routers(arrays, path, "bias"):
        if np.any(np.asarray(arrays[name], dtype=np.float32)):
            raise UnsupportedError(name, "a router's bias", "none, or zeros")
    kernels = list(_routers(arrays, path, "kernel"))
    if len(kernels) != 1:
        found = f"{len(kernels)} router kernels"
        raise MissingTensorError(f"{path}/.../router/.../kernel", found, "one")
    kernel = _array(arrays, kernels[0], 2)
    expected = [experts.a.shape[1], len(experts.ranks)]
    if list(kernel.shape) != expected:
        raise ShapeError(kernels[0], list(kernel.shape), expected)
    return kernel.T.contiguous()


def _routers(arrays: Arrays, path: str, last: str) -> Iterator[str]:
    for name in arrays:
        inside = name.removeprefix(f"{path}/")
        if inside != name and "router" in inside and inside.endswith(f"/{last}"):
            yield name


def _array(arrays: Arrays, name: str, dimensions: int) -> Tensor:
    if name not in arrays:
        raise MissingTensorError(name, "no such array", "one")
    array = np.asarray(arrays[name])
    if array.ndim != dimensions or 0 in array.shape:
        expected = f"{dimensions} dimensions, none of them empty"
        raise ShapeError(name, list(array.shape), expected)
    try:
        # JAX's bfloat16 is a dtype of its own that numpy converts and torch does not know.
        tensor = torch.from_numpy(array.astype(np.float32))
    except (TypeError, ValueError):
        raise UnsupportedError(name, array.dtype, "floating-point numbers") from None
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(name, "NaN or Inf", "finite values")
    return tensor
