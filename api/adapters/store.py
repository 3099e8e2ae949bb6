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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from molehill.api.adapters.chat import AdapterChat, encode, read_kept
from molehill.api.adapters.store_lock import DirectoryLock
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.formats.io.files import read_start
from molehill.engine.system.atomic_directory import appearing

# Of directories for files that clients send.
UPLOAD = ".upload-"

# Copies, chats, what was merged into the base weights, any where it was not finished, and uploads.
LEFT = re.compile(r"(base-|chat-)?[0-9a-f]{64}|\.(base-|chat-)?[0-9a-f]{64}-.*|\.upload-.*")
CHAT_FILE = "chat.json"


def chat_name(digest: str) -> str:
    return f"chat-{digest}"


class AdapterStore:
    """Directories `<root>/<digest>`, each as long as somebody holds it, and `<root>/chat-<digest>`
    of what goes with some of them: weights are the same whatever is said to them. Thread-safe.

    Without a root of its own choice it uses a temporary directory that goes with the process.
    scratch: where that is, in a directory that somebody else removes; None for the system's own.
    claim: keeps other servers out of the root.
    """

    def __init__(self, root: Path | None = None, scratch: Path | None = None) -> None:
        """Raises LockedError if another server has the root."""
        if root is None:
            self.root = Path(tempfile.mkdtemp(prefix="molehill-", dir=scratch))
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

        source: where the adapter was read from; if that is the directory itself, it stays, unless
        its last holder has deleted it since.
        """
        directory = self.path(adapter.digest)
        with self._lock:
            is_copy = source == directory and directory.is_dir()
            if not self._holders[adapter.digest] and not is_copy:
                # Of an earlier server that was killed.
                shutil.rmtree(directory, ignore_errors=True)
                native.write(adapter, directory)
            self._holders[adapter.digest] += 1
        return directory

    def acquire_chat(self, chat: AdapterChat) -> None:
        """Kept for the next server, until it is released. Raises OSError."""
        name, content = chat_name(chat.digest), encode(chat)
        directory = self.root / name
        with self._lock:
            kept = read_start(directory / CHAT_FILE, len(content) + 1)
            if not self._holders[name] and kept != content:
                shutil.rmtree(directory, ignore_errors=True)
                with appearing(directory) as partial:
                    (partial / CHAT_FILE).write_bytes(content)
            self._holders[name] += 1

    @contextmanager
    def upload_directory(self) -> Iterator[Path]:
        """For files that are on their way into a copy; gone at the end. Raises OSError."""
        temporary = tempfile.TemporaryDirectory(
            prefix=UPLOAD, dir=self.root, ignore_cleanup_errors=True
        )
        with temporary as folder:
            directory = Path(folder).resolve() / "upload"
            directory.mkdir()
            yield directory

    def read_chat(self, digest: str) -> AdapterChat:
        """Of this server or an earlier one. Raises CorruptFileError."""
        return read_kept(self.root / chat_name(digest) / CHAT_FILE, digest)

    def release(self, digest: str) -> None:
        """Lets go of a directory; the last holder deletes it."""
        self._release(digest)

    def release_chat(self, digest: str) -> None:
        """As `release`, of a chat."""
        self._release(chat_name(digest))

    def _release(self, name: str) -> None:
        with self._lock:
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                shutil.rmtree(self.root / name, ignore_errors=True)

    def hold(self, directory: Path) -> None:
        """Keeps a directory that was written beside the copies."""
        with self._lock:
            self._holders[directory.name] += 1

    def sweep(self, keep: Collection[str]) -> None:
        """Deletes what an earlier server left, but for what is held, and the names in `keep`:
        digests, or what `chat_name` makes of them."""
        with self._lock:
            for path in self.root.iterdir():
                is_needed = path.name in keep or path.name in self._holders
                if LEFT.fullmatch(path.name) and not is_needed:
                    shutil.rmtree(path, ignore_errors=True)
