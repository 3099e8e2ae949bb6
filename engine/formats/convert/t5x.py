"""MoLoRA and MoV out of T5X: the arrays of a JAX checkpoint into a canonical adapter.

The methods' authors publish JAX code and no file format of their own; a checkpoint, flattened to
names with slashes, holds for each adapted projection (MoLoRA)

    {path}/lora_A [E, in, r]    {path}/lora_B [E, r, out]    {path}/.../router/.../kernel [in, E]

y = W x + alpha / r * sum_e p_e (x A_e) B_e with p = softmax(x kernel), arXiv 2309.05444; with top_k
the other p are 0 and the kept ones are not renormalised. Or, for each rescaled activation u (MoV),

    {path}/mov_scaling [heads, E, width] or [E, width]       {path}/.../router/.../kernel [width, E]

u * sum_e p_e l_e with p = softmax(u kernel): the output of a projection, head by head, or the
intermediate of an FFN, which is the input of its last projection.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check
from molehill.kernels.mixture import Experts, LinearMixture, Mixture, ScaleMixture
from molehill.kernels.policy import Policy, Soft, TopK

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
    """A MoLoRA or MoV adapter, of any float dtype, self-consistent and within the limits.

    arrays: by name, as in `numpy.load("checkpoint.npz")`. The base model's own are not looked at.
    modules: where each projection of the checkpoint belongs in the model that is served, as
        {"decoder/layers_0/mlp/wi_lora": "layers.0.mlp.up_proj"}; for vectors [E, width] the
        projection whose input they rescale, a gated FFN's "layers.0.mlp.down_proj".
    alpha: the code's `alpha`; the rank is the arrays'. top_k: the code's, None for soft mixing.
    Raises ConfigError, LimitError, MissingTensorError, NonFiniteError, NothingBoundError,
    ShapeError, and UnsupportedError (router biases, arrays outside `modules`, vectors on what else
    has low-rank experts).
    """
    if alpha <= 0:
        raise ConfigError("alpha", alpha, "a number above 0")
    if top_k is not None and top_k < 1:
        raise ConfigError("top_k", top_k, "a whole number of at least 1, or None")
    _check_all_mapped(arrays, modules)
    policy = Soft() if top_k is None else TopK(top_k, normalize=False)
    sites: dict[str, Mixture] = {}
    for path, module in modules.items():
        if module in sites:
            raise ConfigError(f"modules: {path}", module, "a module that no other path has")
        if f"{path}/mov_scaling" in arrays:
            sites[module] = _vectors(arrays, path, policy)
        else:
            experts = _experts(arrays, path, alpha)
            router = _router(arrays, path, experts.a.shape[1], len(experts.ranks))
            sites[module] = LinearMixture(experts, policy, router)
    vectors = any(isinstance(mixture, ScaleMixture) for mixture in sites.values())
    adapter = Adapter("mov" if vectors else "molora", sites, base_model)
    check(adapter, limits)
    return adapter


def _check_all_mapped(arrays: Arrays, modules: Mapping[str, str]) -> None:
    for name in arrays:
        path, _, last = name.rpartition("/")
        if last in ("lora_A", "lora_B", "mov_scaling") and path not in modules:
            raise UnsupportedError(name, "an adapter's array outside `modules`", "its path there")
        if last == "mov_scaling" and f"{path}/lora_A" in arrays:
            raise UnsupportedError(name, "vectors beside low-rank experts", "one of the two")


def _experts(arrays: Arrays, path: str, alpha: float) -> Experts:
    a, b = _array(arrays, f"{path}/lora_A", 3), _array(arrays, f"{path}/lora_B", 3)
    count, inputs, rank = a.shape
    if b.shape[:2] != (count, rank):
        raise ShapeError(f"{path}/lora_B", list(b.shape), [count, rank, b.shape[2]])
    rows = a.transpose(1, 2).reshape(count * rank, inputs)
    columns = b.reshape(count * rank, b.shape[2]).T * (alpha / rank)
    return Experts(rows.contiguous(), columns.contiguous(), (rank,) * count)


def _vectors(arrays: Arrays, path: str, policy: Policy) -> ScaleMixture:
    name = f"{path}/mov_scaling"
    of_input = np.asarray(arrays[name]).ndim == 2
    vectors = _array(arrays, name, 2 if of_input else 3)
    router = _router(arrays, path, vectors.shape[-1], vectors.shape[-2])
    if of_input:
        return ScaleMixture(vectors.unsqueeze(0), policy, router, "input")
    return ScaleMixture(vectors, policy, router)


def _router(arrays: Arrays, path: str, inputs: int, experts: int) -> Tensor:
    for name in _routers(arrays, path, "bias"):
        if np.any(np.asarray(arrays[name], dtype=np.float32)):
            raise UnsupportedError(name, "a router's bias", "none, or zeros")
    kernels = list(_routers(arrays, path, "kernel"))
    if len(kernels) != 1:
        found = f"{len(kernels)} router kernels"
        raise MissingTensorError(f"{path}/.../router/.../kernel", found, "one")
    kernel = _array(arrays, kernels[0], 2)
    expected = [inputs, experts]
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
