"""Where clients may load adapters from."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from molehill.api.adapters.errors import BadPathError, ForbiddenPathError
from molehill.api.adapters.source import Source, fingerprint
from molehill.engine.adapter.errors import AdapterNotFoundError
from molehill.engine.adapter.layout import Layout


def operator_source(
    path: Path,
    lora_b_layout: Layout | None = None,
    base_is_residual: bool = False,
    non_granular_after: int | None = None,
) -> Source:
    """Any directory that the operator names, at every start."""
    directory = path.resolve()
    return Source(
        directory,
        str(path),
        fingerprint(directory),
        remembered=False,
        shared=True,
        lora_b_layout=lora_b_layout,
        base_is_residual=base_is_residual,
        non_granular_after=non_granular_after,
    )


class AdapterRoots:
    """The directories below which clients may name adapters, resolved once at start."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve(strict=True) for root in roots]

    def resolve(self, text: str) -> Source:
        """The directory that a client means: below a root, or relative to the first that has it.

        Raises BadPathError, ForbiddenPathError if the path or an entry below it leads out of the
        root (by `..`, an absolute path or a symbolic link) or is no regular file, and
        AdapterNotFoundError. What lies outside is refused whether it exists or not.
        """
        if not text or "\0" in text or not text.isprintable():
            raise BadPathError("source: found an empty path or one that cannot be printed")
        if not self._roots:
            raise ForbiddenPathError("source: this server was started without --adapter-root")
        try:
            return self._first_directory(text)
        except OSError as error:
            raise BadPathError(f"source: {error.strerror}") from error

    def has(self, text: str) -> bool:
        """Whether `resolve` finds something there, be it that it refuses it."""
        return any(os.path.lexists(root / text) for root in self._roots)

    def _first_directory(self, text: str) -> Source:
        # An absolute `text` replaces the root in `root / text`.
        paths = [Path(os.path.realpath(root / text)) for root in self._roots]
        for path in paths:
            root = self._root_of(path)
            if root is not None and path.is_dir():
                source = Source(path, text, fingerprint(path), shared=True)
                check_entries(source, root)
                return source
        if any(self._root_of(path) is None for path in paths):
            raise ForbiddenPathError(f"source: {text!r} leads out of the adapter roots")
        raise AdapterNotFoundError(text, "no such directory", "an adapter below an adapter root")

    def entries(self) -> tuple[dict[str, Path], dict[Path, str]]:
        """The directories right below the roots by name, of the first root that has each; and what
        cannot be looked at, with the reason."""
        directories: dict[str, Path] = {}
        errors: dict[Path, str] = {}
        for root in self._roots:
            try:
                entries = list(os.scandir(root))
            except OSError as error:
                errors[root] = str(error)
                continue
            for entry in entries:
                try:
                    if entry.is_dir():
                        directories.setdefault(entry.name, Path(entry.path))
                except OSError as error:
                    errors[Path(entry.path)] = str(error)
        return directories, errors

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self._roots if path.is_relative_to(root)), None)


def check_entries(source: Source, root: Path) -> None:
    """Raises ForbiddenPathError for a link that leaves `root`, also below a directory that a link
    leads to, or for a pipe, socket or device."""
    folders, seen = [source.directory], {source.directory}
    while folders:
        for entry in _entries(folders.pop()):
            target = Path(os.path.realpath(entry))
            if not target.is_relative_to(root):
                raise ForbiddenPathError(
                    f"{source.relabel(str(entry))}: a link that leads out of the adapter root"
                )
            try:
                mode = target.stat().st_mode
            except OSError:
                # A link to nothing, or a file that has just gone: its reader says so.
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise ForbiddenPathError(f"{source.relabel(str(entry))}: not a regular file")
            if stat.S_ISDIR(mode) and target not in seen:
                seen.add(target)
                folders.append(entry)


def _entries(folder: Path) -> list[Path]:
    """None of one that cannot be looked at: its reader says so."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
