"""`python -m molehill.api.vllm.check_sources PLACE`: whether a vLLM would do, from its files.

PLACE is a wheel of that version, or a folder that holds its package `vllm`; it need not be
installed. Prints every seam; ends with 1 if one is not as molehill expects it.
"""

import argparse
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from molehill.api.vllm import compat
from molehill.engine.vllm import compat as engine
from molehill.engine.vllm.seam_sources import SourceTree


@contextmanager
def unpacked(place: Path) -> Iterator[Path]:
    """The folder, or a temporary one with a wheel's Python files. Raises ValueError."""
    if place.is_dir():
        yield place
        return
    if not zipfile.is_zipfile(place):
        raise ValueError(f"{place}: found neither a folder nor a wheel")
    with tempfile.TemporaryDirectory(prefix="molehill-") as folder, zipfile.ZipFile(place) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
        yield Path(folder)


def report(folder: Path) -> int:
    """Prints every seam; how many have changed. Raises ValueError."""
    if not (folder / "vllm" / "__init__.py").is_file():
        raise ValueError(f"{folder}: found no vllm/__init__.py")
    table = Table(box=None)
    for column in ("seam", "module", "for", ""):
        table.add_column(column, overflow="fold")
    changed = 0
    for seam, text in SourceTree(folder).faults((*engine.SEAMS, *compat.SEAMS)):
        changed += text is not None
        table.add_row(seam.name, seam.module, seam.user, text or "ok")
    console = Console()
    console.print(table)
    console.print(f"{table.row_count} seams, {changed} of them changed")
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check_sources", description=__doc__)
    parser.add_argument("place", type=Path, help="a wheel, or a folder that holds the package vllm")
    place = parser.parse_args(arguments).place
    try:
        with unpacked(place) as folder:
            return int(report(folder) > 0)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
