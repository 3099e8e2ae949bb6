"""Canonical copies of the loaded adapters, by content digest.

Workers load from here, so what they load is what was validated, whatever happens to the client's
files meanwhile. vLLM keys its prefix cache by an adapter's name and path: other weights have
another path, so they never meet old KV entries.
"""

import re
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from molehill.api.adapters.store_lock import DirectoryLock
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native

# Copies, what was merged into the base weights, and either where it was not finished.
LEFT = re.compile(r"(base-)?[0-9a-f]{64}|\.(base-)?[0-9a-f]{64}-.*")


class AdapterStore:
    """Directories `<root>/<digest>`, each as long as somebody holds it. Thread-safe.

    Without a root of its own choice it uses a temporary directory that goes with the process.
    claim: keeps other servers out of the root.
    """

    def __init__(self, root: Path | None = None) -> None:
        """Raises LockedError if another server has the root."""
        if root is None:
            self.root = Path(tempfile.mkdtemp(prefix="molehill-"))
            weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        else:
            self.root = root.resolve()
            self.root.mkdir(parents=True, exist_ok=True)
            self.claim = DirectoryLock(self.root)
        self._holders: Counter[str] = Counter()
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        return self.root / digest

    def acquire(self, adapter: Adapter, source: Path | None = None) -> Path:
        """The adapter's directory, written if nobody holds it yet. Raises OSError.

        source: where the adapter was read from; if that is the directory itself, it stays.
        """
        directory = self.path(adapter.digest)
        with self._lock:
            if not self._holders[adapter.digest] and source != directory:
                # Of an earlier server that was killed.
                shutil.rmtree(directory, ignore_errors=True)
                native.write(adapter, directory)
            self._holders[adapter.digest] += 1
        return directory

    def release(self, digest: str) -> None:
        """Lets go of a directory; the last holder deletes it."""
        with self._lock:
            self._holders[digest] -= 1
            if not self._holders[digest]:
                del self._holders[digest]
                shutil.rmtree(self.path(digest), ignore_errors=True)

    def hold(self, directory: Path) -> None:
        """Keeps a directory that was written beside the copies."""
        with self._lock:
            self._holders[directory.name] += 1

    def sweep(self, keep: Collection[str]) -> None:
        """Deletes what an earlier server left, but for what is held, and the digests in `keep`."""
        with self._lock:
            for path in self.root.iterdir():
                is_needed = path.name in keep or path.name in self._holders
                if LEFT.fullmatch(path.name) and not is_needed:
                    shutil.rmtree(path, ignore_errors=True)
