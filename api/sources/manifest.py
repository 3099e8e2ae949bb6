"""What a restarted server needs to know: the names, what they serve, and where it came from."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.mix import Mix
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits
from molehill.engine.adapter.layout import Layout

logger = logging.getLogger("vllm.molehill")

FILE = "manifest.json"
VERSION = 1


class ManifestError(ValueError):
    """A manifest that cannot be read. A server that went on would forget its adapters."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One name. generation: digest of what it serves. source, fingerprint, lora_b_layout,
    base_is_residual, non_granular_after, desired, mix: see Source; the layout empty for none.
    when_not_invoked: see GenerationStatus; empty for None. probed: that it has an effect was seen,
    or is not asked for. chat: digest of what the store keeps beside its copy; empty for none.
    limits: of its traffic.
    """

    name: str
    generation: str
    source: str
    fingerprint: str
    pinned: bool
    probed: bool = True
    lora_b_layout: Layout | Literal[""] = ""
    base_is_residual: bool = False
    when_not_invoked: WhenNotInvoked | Literal[""] = ""
    mix: Mix | None = None
    desired: bool = False
    chat: str = ""
    limits: TrafficLimits = NO_LIMITS
    non_granular_after: int | None = None

    @property
    def layout(self) -> Layout | None:
        return self.lora_b_layout or None

    @property
    def asked(self) -> tuple[Layout | None, bool, int | None]:
        """How the source is to be read."""
        return self.layout, self.base_is_residual, self.non_granular_after

    @property
    def not_invoked(self) -> WhenNotInvoked | None:
        return self.when_not_invoked or None


class Document(msgspec.Struct):
    """The file. adapters: the fields of an Entry each, in this version."""

    version: int
    adapters: list[Any]


class Manifest:
    """One JSON file, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> list[Entry]:
        """The entries of an earlier server, none if there was none. Raises ManifestError."""
        try:
            document = msgspec.convert(json.loads(self.path.read_text()), Document)
            if document.version == VERSION:
                return msgspec.convert(document.adapters, list[Entry])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, msgspec.ValidationError) as error:
            raise ManifestError(f"{self.path}: found {error!r}, expected a manifest") from error
        raise ManifestError(f"{self.path}: version: found {document.version}, expected {VERSION}")

    def write(self, entries: list[Entry]) -> bool:
        """Whether it is on disk now. Logs what stops it: a full disk must not stop the adapters
        that are served."""
        partial = self.path.with_suffix(".partial")
        document = msgspec.to_builtins(Document(VERSION, list(entries)))
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
