"""Copies of the loaded adapters as they are served, by content digest.

Workers load from here, so what they load is what was validated, whatever happens to the client's
files meanwhile. An adapter goes by the digest of what was loaded; where it is served otherwise,
with its static parts merged, the directory's name has both digests. vLLM keys its prefix cache by
an adapter's name and path: other weights have another path, so they never meet old KV entries.
"""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molehill.engine.adapter import Adapter
from molehill.engine.formats import native

Preparation = Callable[[Adapter], Adapter]


@dataclass
class _Copy:
    directory: Path
    holders: int = 0


class AdapterStore:
    """A directory for each adapter, as long as somebody holds it. Thread-safe.

    prepare: makes what is served of what was loaded. Without a root of its own choice the store
    uses a temporary directory that goes with the process.
    """

    def __init__(self, root: Path | None = None, prepare: Preparation | None = None) -> None:
        if root is None:
            self.root = Path(tempfile.mkdtemp(prefix="molehill-"))
            weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        else:
            self.root = root.resolve()
            self.root.mkdir(parents=True, exist_ok=True)
        self._prepare = prepare
        self._copies: dict[str, _Copy] = {}
        self._lock = threading.Lock()

    def acquire(self, adapter: Adapter) -> Path:
        """The adapter's directory, written if nobody holds it yet. Raises OSError."""
        with self._lock:
            copy = self._copies.get(adapter.digest)
            if copy is None:
                copy = _Copy(self._write(adapter))
                self._copies[adapter.digest] = copy
            copy.holders += 1
        return copy.directory

    def _write(self, adapter: Adapter) -> Path:
        served = self._prepare(adapter) if self._prepare else adapter
        name = adapter.digest
        if served.digest != adapter.digest:
            name = f"{adapter.digest}-{served.digest}"
        directory = self.root / name
        # Of an earlier server that was killed.
        shutil.rmtree(directory, ignore_errors=True)
        native.write(served, directory)
        return directory

    def release(self, digest: str) -> None:
        """Lets go of the directory of the adapter that was loaded; the last holder deletes it."""
        with self._lock:
            copy = self._copies[digest]
            copy.holders -= 1
            if not copy.holders:
                del self._copies[digest]
                shutil.rmtree(copy.directory, ignore_errors=True)
