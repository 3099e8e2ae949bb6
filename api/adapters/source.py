"""What an adapter is read from, and whether that has been touched since."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from molehill.api.adapters.errors import SourceChangedError
from molehill.api.adapters.mix import Mix
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.layout import Layout


@dataclass(frozen=True)
class Source:
    """An adapter's directory (resolved), and what to call it before clients.

    label: brings the same adapter again; a repository with its commit. fingerprint: tells whether
    files that stay where they are have been touched since; empty for what was fetched.
    remembered: a restarted server serves it again by itself. desired: the operator's adapters file
    wants it, and takes it away again when it does not. shared: others may write to the
    directory while it is read. lora_b_layout: how whoever loads it wants it read, see
    `formats.readers.expert_layout`. base_is_residual: what they say of the base, see
    `formats.readers.changed_base`. non_granular_after: how many tokens of an X-LoRA's answers they
    want with scalings of their own, see `formats.readers.non_granular`. canonical: the directory is
    a copy of what was read. mix: the served adapters that it is the sum of; the directory is then a
    copy of one of them, unless it is canonical. chat: digest of what the store keeps beside a copy;
    empty for none.
    """

    directory: Path
    label: str
    fingerprint: str = ""
    remembered: bool = True
    desired: bool = False
    shared: bool = False
    lora_b_layout: Layout | None = None
    base_is_residual: bool = False
    non_granular_after: int | None = None
    canonical: bool = False
    mix: Mix | None = None
    chat: str = ""

    @property
    def asked_layout(self) -> Layout | None:
        """What the directory's reader is told; a copy has the experts in order already."""
        return None if self.canonical else self.lora_b_layout

    @property
    def asked_residual(self) -> bool:
        """What the directory's reader is told; a copy no longer says how training began."""
        return self.base_is_residual and not self.canonical

    @property
    def asked_non_granular(self) -> int | None:
        """What the directory's reader is told; a copy says it itself."""
        return None if self.canonical else self.non_granular_after

    @property
    def public(self) -> str:
        """The label, unless it is a path of the operator's."""
        return self.label if self.remembered else "--adapter"

    def check_untouched(self) -> None:
        """Raises SourceChangedError if what was read is not what `fingerprint` was taken of."""
        if self.shared and fingerprint(self.directory) != self.fingerprint:
            raise SourceChangedError(f"{self.label}: the files changed while they were read")

    def relabel(self, message: str) -> str:
        """`message` with the label in place of the server's path."""
        return message.replace(str(self.directory), self.label)

    def relabel_error(self, error: AdapterError) -> AdapterError:
        """The same error with the label in place of the server's path."""
        parts = (error.where, error.found, error.expected)
        return type(error)(*(self.relabel(part) for part in parts))


def fingerprint(directory: Path) -> str:
    """Names, sizes and times of the files and folders; it changes when any of them is written or
    exchanged, and when one is moved away and back."""
    sha = hashlib.sha256()
    for folder, directories, files in os.walk(directory):
        directories.sort()
        for name in (".", *sorted(files)):
            path = Path(folder, name)
            try:
                stat = path.stat()
            except OSError:
                continue
            where = path.relative_to(directory)
            facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            # Names may be bytes that are no UTF-8.
            sha.update(f"{where}\0{facts}\0".encode(errors="surrogateescape"))
    return sha.hexdigest()


@contextmanager
def local(source: Source) -> Iterator[Source]:
    """A source that is in this file system already, as what a Fetch is."""
    yield source
