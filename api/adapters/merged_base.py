"""The adapter whose static part is in the base weights."""

from dataclasses import dataclass
from pathlib import Path

from molehill.api.adapters.errors import MergedIntoBaseError


@dataclass(frozen=True)
class MergedBaseAdapter:
    """digest: of the adapter as it was read. directory: of its merged copy, in the native format.

    Its weights cannot change while the server runs.
    """

    name: str
    digest: str
    directory: Path

    def check_load(self, name: str, digest: str) -> None:
        """Raises MergedIntoBaseError."""
        if name == self.name and digest != self.digest:
            raise MergedIntoBaseError(
                f"The lora adapter '{name}' is merged into the base weights with other weights "
                "than these. It cannot be replaced; restart the server to change it."
            )

    def check_unload(self, name: str) -> None:
        """Raises MergedIntoBaseError."""
        if name == self.name:
            raise MergedIntoBaseError(
                f"The lora adapter {name!a} is merged into the base weights and cannot be unloaded."
            )
