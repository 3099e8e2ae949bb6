"""Whether torchvision is one that Transformers can live with."""

import importlib
import importlib.util
from importlib.metadata import version

_PACKAGE = "torchvision"


def check_importable() -> None:
    """Raises ImportError where torchvision is installed and cannot be imported, as PyPI's cannot
    beside a CPU build of torch.

    Transformers only looks whether it is installed, and then fails where it is asked for a model;
    vLLM fails while it is imported, in processes that run nothing of ours before.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return
    try:
        importlib.import_module(_PACKAGE)
    except Exception as error:
        raise ImportError(
            f"{_PACKAGE} {version(_PACKAGE)} is installed and cannot be imported beside torch "
            f"{version('torch')} ({error}): `pip uninstall {_PACKAGE}`, which text models do not "
            "need, or install its build for this torch"
        ) from error
