"""Directories that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A scratch directory to write to, which becomes `directory` if the block ends well.

    Raises FileExistsError if there is a directory with files in it already.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(directory: Path) -> None:
    """Before anything is read; `appearing` sees to it again. Raises FileExistsError."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise FileExistsError(f"{directory} exists")


def _rename(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:
        if directory.exists():
            raise FileExistsError(f"{directory} exists") from None
        raise
