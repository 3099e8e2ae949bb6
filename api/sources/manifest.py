"""What a restarted server needs to know: the names, what they serve, and where it came from."""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehill.api.adapters.invocation import CHOICES, WhenNotInvoked
from molehill.engine.adapter.layout import LAYOUTS, Layout

logger = logging.getLogger("vllm.molehill")

FILE = "manifest.json"
VERSION = 1


class ManifestError(ValueError):
    """A manifest that cannot be read. A server that went on would forget its adapters."""


@dataclass(frozen=True)
class Entry:
    """One name. generation: digest of what it serves. source, fingerprint, lora_b_layout,
    base_is_residual, desired: see Source; the layout empty for none. when_not_invoked: see
    GenerationStatus; empty for None. probed: that it has an effect was seen, or is not asked for.
    """

    name: str
    generation: str
    source: str
    fingerprint: str
    pinned: bool
    probed: bool = True
    lora_b_layout: str = ""
    base_is_residual: bool = False
    when_not_invoked: str = ""
    desired: bool = False

    @property
    def layout(self) -> Layout | None:
        return next((layout for layout in LAYOUTS if layout == self.lora_b_layout), None)

    @property
    def not_invoked(self) -> WhenNotInvoked | None:
        return next((choice for choice in CHOICES if choice == self.when_not_invoked), None)


class Manifest:
    """One JSON file, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> list[Entry]:
        """The entries of an earlier server, none if there was none. Raises ManifestError."""
        try:
            document = json.loads(self.path.read_text())
            if document["version"] != VERSION:
                raise ManifestError(
                    f"{self.path}: version: found {document['version']}, expected {VERSION}"
                )
            return [entry(fields) for fields in document["adapters"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"{self.path}: found {error!r}, expected a manifest") from error

    def write(self, entries: list[Entry]) -> bool:
        """Whether it is on disk now. Logs what stops it: a full disk must not stop the adapters
        that are served."""
        partial = self.path.with_suffix(".partial")
        document = {"version": VERSION, "adapters": [asdict(entry) for entry in entries]}
        try:
            with partial.open("w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
            synchronise(self.path.parent)
        except OSError:
            logger.exception("The manifest could not be written; a restart would not know this")
            return False
        return True


def synchronise(folder: Path) -> None:
    """A rename outlives a loss of power only when its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entry(fields: dict[str, Any]) -> Entry:
    made = Entry(**fields)
    for name, kind in Entry.__annotations__.items():
        if not isinstance(getattr(made, name), kind):
            raise TypeError(f"{name}: found {getattr(made, name)!r}, expected {kind.__name__}")
    if made.lora_b_layout not in ("", *LAYOUTS):
        raise ValueError(f"lora_b_layout: found {made.lora_b_layout!r}, expected one of {LAYOUTS}")
    if made.when_not_invoked not in ("", *CHOICES):
        raise ValueError(
            f"when_not_invoked: found {made.when_not_invoked!r}, expected one of {CHOICES}"
        )
    return made
