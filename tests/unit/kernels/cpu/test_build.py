"""What is told while the C++ kernels are compiled, and where they are put."""

import fcntl
import logging
import subprocess
import sys

import pytest
from support.fake_compiler import compiler, empty_installation, without_compiler

from molehill.kernels.cpu import build


@pytest.fixture
def build_records():
    """Records of the build's log, which may be cut off from pytest's by vLLM's settings."""
    records: list[logging.LogRecord] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keeper = Keeper()
    level = build.logger.level
    build.logger.addHandler(keeper)
    build.logger.setLevel(logging.INFO)
    yield records
    build.logger.removeHandler(keeper)
    build.logger.setLevel(level)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PROGRESS_SECONDS", 0.1)
    return empty_installation(monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_compilation_is_told_at_once_and_while_it_goes_on(
    build_records, places, tmp_path, monkeypatch
):
    compiler(monkeypatch, tmp_path, seconds=0.3)
    _, cache = places
    library = build._find_or_compile()
    assert library == build.Library(cache / build.library_name(), compiled=True)
    first, *progress, last = (record.getMessage() for record in build_records)
    units = len(build._units())
    assert first.startswith(f"molehill: compiling the C++ kernels, {units} files on ")
    assert f"kept in {cache}" in first
    assert progress
    assert all(f" of {units} files after " in line for line in progress)
    assert last.startswith("molehill: C++ kernels compiled in ")
    stages = [record.stage for record in build_records if hasattr(record, "stage")]
    assert len(stages) == 1 + len(progress)
    # Whoever asks over HTTP learns no path.
    assert not any(str(tmp_path) in stage for stage in stages)


def test_a_second_start_finds_it_and_says_nothing(build_records, places, tmp_path, monkeypatch):
    compiler(monkeypatch, tmp_path)
    build._find_or_compile()
    build_records.clear()
    assert not build._find_or_compile().compiled
    assert build_records == []


def test_a_file_that_does_not_compile_leaves_nothing(build_records, places, tmp_path, monkeypatch):
    compiler(monkeypatch, tmp_path, fails="scale.cpp")
    _, cache = places
    with pytest.raises(build.BuildError, match="no such instruction"):
        build._find_or_compile()
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_who_waits_for_another_process_says_so(build_records, places, tmp_path, monkeypatch):
    compiler(monkeypatch, tmp_path)
    _, cache = places
    cache.mkdir()
    code = (
        "import fcntl, pathlib, sys, time\n"
        "folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "with (folder / 'lock').open('w') as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
        "    (folder / name).write_text('compiled')\n"
    )
    command = [sys.executable, "-c", code, str(cache), build.library_name()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        closed = []

        def let_go(record: logging.LogRecord) -> bool:
            if not closed:
                closed.append(other.stdin.close())
            return True

        build.logger.addFilter(let_go)
        try:
            library = build._find_or_compile()
        finally:
            build.logger.removeFilter(let_go)
    assert not library.compiled
    waiting = f"waiting for another process that compiles the C++ kernels into {cache}"
    assert build_records[0].getMessage() == f"molehill: {waiting}"
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_installation_gets_the_library_beside_the_package(places, tmp_path, monkeypatch):
    here, cache = places
    compiler(monkeypatch, tmp_path)
    assert build.install() == build.Library(here / build.library_name(), compiled=True)
    assert build.install() == build.Library(here / build.library_name(), compiled=False)
    assert not cache.exists()


def test_an_installation_takes_it_from_the_cache(places, tmp_path, monkeypatch):
    here, cache = places
    compiler(monkeypatch, tmp_path)
    build._find_or_compile()
    without_compiler(monkeypatch, tmp_path)
    name = build.library_name()
    assert build.install() == build.Library(here / name, compiled=False)
    assert (here / name).read_bytes() == (cache / name).read_bytes()
    assert [path.name for path in here.iterdir()] == [name]
