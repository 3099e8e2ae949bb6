"""Adapters that clients send: their files lie beside the store's copies until they are read."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import BadUploadError, BusyError, StoreError
from molehill.api.adapters.store import AdapterStore
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats.registry import pickle_files

# Before the name, in place of a source. Nothing can be loaded from there again.
UPLOAD = "upload://"

# An index may name 1000 shards; beside them lie configs, tokenizer files and the like.
MOST_FILES = 1100

_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+){0,3}", re.ASCII)
_CHARACTERS = 255


class Uploads:
    """Bounds on what clients send. store: where it goes."""

    def __init__(self, store: AdapterStore, admission: AdmissionLimits) -> None:
        self.limit = admission.upload_bytes
        self._store = store
        self._places = admission.loads
        self._begun = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Held by an upload until it is loaded. Raises BusyError."""
        if self._begun >= self._places:
            raise BusyError(
                f"uploads: found {self._begun} on their way, expected fewer than {self._places}"
            )
        self._begun += 1
        try:
            yield
        finally:
            self._begun -= 1

    @contextmanager
    def files(self) -> Iterator["UploadedFiles"]:
        """Of one upload; gone at the end. Raises StoreError."""
        with ExitStack() as stack:
            with _writing("upload"):
                directory = stack.enter_context(self._store.upload_directory())
            yield stack.enter_context(closing(UploadedFiles(directory)))


class UploadedFiles:
    """Writes files below a directory, one after the other, in any thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._names: set[str] = set()
        self._name = ""
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._names)

    def begin(self, name: str) -> None:
        """Opens the file `name`, a path relative to the directory.

        Raises BadUploadError for a name that leads elsewhere or was there before, UnsupportedError
        for a pickle, StoreError.
        """
        if len(name) > _CHARACTERS or not _NAME.fullmatch(name):
            raise BadUploadError(
                f"file name: found {name[:200]!a}, expected a relative path of at most "
                f"{_CHARACTERS} letters, digits, `.`, `_`, `-` and `/`, no part of which begins "
                "with a dot"
            )
        if PurePosixPath(name).name in pickle_files():
            expected = (
                "safetensors, for no pickles are taken in an upload; `molehill convert` writes it"
            )
            raise UnsupportedError(name, "a pickle", expected)
        if len(self._names) >= MOST_FILES:
            raise BadUploadError(f"files: found more than {MOST_FILES}, expected at most so many")
        path = self.directory / name
        with _writing(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        self._name = name
        self._names.add(name)

    def write(self, data: memoryview) -> None:
        """To the file that was begun last. Raises StoreError."""
        assert self._file is not None
        with _writing(self._name):
            self._file.write(data)

    def end(self) -> None:
        """Of that file. Raises StoreError."""
        assert self._file is not None
        with _writing(self._name):
            self._file.close()

    def close(self) -> None:
        """Of one that was not ended, whose rest nobody needs."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise BadUploadError(
            f"{name}: found it twice, as a file or as a folder of files, expected it once"
        ) from error
    except OSError as error:
        raise StoreError(f"{name}: the store did not take it: {error.strerror}") from error
