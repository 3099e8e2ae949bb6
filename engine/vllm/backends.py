"""Chooses the backend of a worker."""

import torch
from vllm.logger import init_logger

from molehill.kernels.backend import Backend
from molehill.kernels.cpu.backend import CpuBackend
from molehill.kernels.cpu.build import BuildError
from molehill.kernels.torch_backend import TorchBackend

# vLLM's processes show the logs of loggers under this name only.
logger = init_logger("vllm.molehill")

NAMES = ("auto", "cpu", "torch")


def choose(name: str, device: torch.device) -> Backend:
    """The backend called `name`, or for `auto` the fastest that runs on `device`.

    Raises ValueError for a name that does not exist, BuildError for a backend that was asked for by
    name and cannot be built.
    """
    if name not in NAMES:
        raise ValueError(f"backend: found {name!r}, expected one of {', '.join(NAMES)}")
    if name == "torch" or device.type != "cpu":
        return TorchBackend()
    try:
        return CpuBackend()
    except BuildError as error:
        if name == "cpu":
            raise
        logger.warning("molehill: torch backend instead of C++: %s", error)
        return TorchBackend()
