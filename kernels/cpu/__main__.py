"""Compiles the library beside the package, or into the directory that is named."""

import logging
import sys
from pathlib import Path

from molehill.kernels.cpu.build import HERE, compile_into

logging.basicConfig(level=logging.INFO, format="%(message)s")
print(compile_into(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))
