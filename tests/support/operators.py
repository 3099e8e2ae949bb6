"""Which of torch's operators run in a block."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """names: as `linalg_qr`, of all that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def factorisations(self) -> list[str]:
        """QR and SVD, whose cost is that of a load if every site pays it."""
        return [name for name in self.names if "qr" in name or "svd" in name]
