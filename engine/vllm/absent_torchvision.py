"""torchvision, which vLLM's model files import for images, on machines where it is not installed.

PyPI's torchvision is built for CUDA and cannot be imported beside a CPU build of torch. Qwen3.5's
model file imports Qwen's image processor, and that torchvision, for text models too.
"""

import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

_PACKAGE = "torchvision"
# All that the files of vLLM's text models reach at import: `from <this> import functional`.
_IMPORTED, _NAME = "torchvision.transforms.v2", "functional"


class Missing(ModuleType):
    """A module that can be imported and has nothing in it.

    An attribute raises ImportError, so that `from ... import name` says the same; names with two
    underscores raise AttributeError, as `inspect` and the import system expect.
    """

    def __getattr__(self, name: str) -> Any:
        asked = f"{self.__name__}.{name}"
        if name.startswith("__"):
            raise AttributeError(asked)
        raise ImportError(
            f"{asked}: {_PACKAGE} is not installed; images and videos need its build for torch "
            f"{version('torch')}"
        )


def install() -> None:
    """Makes the model files of text models importable without torchvision.

    The package itself stays absent, so `find_spec` and with it Transformers know that it is: a
    module is looked up by its full name before its parents are. Does nothing where torchvision is.
    """
    if importlib.util.find_spec(_PACKAGE) is not None or _IMPORTED in sys.modules:
        return
    module, functional = Missing(_IMPORTED), Missing(f"{_IMPORTED}.{_NAME}")
    setattr(module, _NAME, functional)
    sys.modules.update({module.__name__: module, functional.__name__: functional})
