"""Chooses the backend of a worker."""

import torch

from molehill.kernels.backend import Backend
from molehill.kernels.cpu.backend import CpuBackend
from molehill.kernels.cpu.build import BuildError
from molehill.kernels.torch_backend import TorchBackend

NAMES = ("auto", "cpu", "torch")


def choose(name: str, device: torch.device) -> tuple[Backend, str]:
    """The backend called `name`, for `auto` the fastest that runs on `device`; and why this one.

    Raises ValueError for a name that does not exist, BuildError for a backend that was asked for by
    name and cannot be built.
    """
    if name not in NAMES:
        raise ValueError(f"backend: found {name!r}, expected one of {', '.join(NAMES)}")
    if name == "torch":
        return TorchBackend(), "as asked for"
    if device.type != "cpu":
        return TorchBackend(), "the Triton backend has not run on a GPU yet"
    try:
        backend = CpuBackend()
    except BuildError as error:
        if name == "cpu":
            raise
        return TorchBackend(), f"the C++ kernels are not available: {error}"
    return backend, f"C++ kernels for {backend.isa}"
