"""The CPU backend: C++ behind torch ops, compiled on first use where no library was shipped."""

from molehill.kernels.cpu.backend import CpuBackend
from molehill.kernels.cpu.build import BuildError

__all__ = ["BuildError", "CpuBackend"]
