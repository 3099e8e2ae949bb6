"""A C++ compiler that makes nothing that could be loaded, but can be waited for, and can fail."""

from pathlib import Path

import pytest

from molehill.kernels.cpu import build

# In as many seconds a file as is said; fails for the one that is named.
COMPILER = """#!/bin/sh
case "$*" in *{fails}*) echo "no such instruction" >&2; exit 1;; esac
while [ "$1" != -o ]; do shift; done
sleep {seconds}
echo "$2" > "$2"
"""


def compiler(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fails: str = "nothing", seconds: float = 0
) -> None:
    script = folder / "compiler"
    script.write_text(COMPILER.format(fails=fails, seconds=seconds))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(folder))


def empty_installation(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Path, Path]:
    """Where the package lies, without a library, and an empty cache."""
    here, cache = folder / "installed", folder / "cache"
    here.mkdir()
    monkeypatch.setattr(build, "HERE", here)
    monkeypatch.setenv("MOLEHILL_CACHE_DIR", str(cache))
    return here, cache
