"""Chooses the backend of a worker."""

import torch
from vllm.logger import init_logger

from molehill.kernels.backend import Backend
from molehill.kernels.torch_backend import TorchBackend

# vLLM's processes show the logs of loggers under this name only.
logger = init_logger("vllm.molehill")


def choose(name: str, device: torch.device) -> Backend:
    """The backend called `name`, or for `auto` the fastest that runs on `device`.

    Raises ValueError for a name that does not exist.
    """
    if name not in ("auto", "torch"):
        raise ValueError(f"backend {name!r} does not exist: choose auto or torch")
    return TorchBackend()
