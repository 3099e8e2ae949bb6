"""torchvision as PyPI has it, in a process of its own.

Its library is built for CUDA and does not load beside a CPU build of torch; without it the package
cannot be imported, as it describes operators that the library would have defined. With these
defined, and never called, its transforms run, which are Python. The folder that
MOLEHILL_TORCHVISION names has the wheel's files: `pip download --no-deps torchvision==0.28.0`,
unzipped.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = os.environ.get("MOLEHILL_TORCHVISION", "")
TESTS = Path(__file__).parents[1]
SECONDS = 600


def is_here() -> bool:
    return bool(FOLDER) or importlib.util.find_spec("torchvision") is not None


def run(function: Callable[[Path], object], argument: Path, log: Path) -> None:
    """Calls a function of a module where torchvision can be imported. log: what it writes."""
    code = (
        "import sys; from pathlib import Path; from support import torchvision; "
        "torchvision.make_importable(); "
        f"from {function.__module__} import {function.__name__} as call; "
        "call(Path(sys.argv[1]))"
    )
    path = os.pathsep.join(filter(None, (FOLDER, str(TESTS))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(argument)]
    with log.open("w") as output:
        result = subprocess.run(
            command, env=environment, stdout=output, stderr=output, timeout=SECONDS
        )
    assert result.returncode == 0, log.read_text()[-4000:]


def make_importable() -> None:
    """Defines the operators that it expects, where its library does not."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        importlib.import_module("torchvision")


# A library's definitions go with it.
_KEPT: list[object] = []
