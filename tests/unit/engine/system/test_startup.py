"""Stages of a start, from the process that is at work to the one that answers."""

import logging
import os
import subprocess
import sys
import threading

import pytest

from molehill.engine.system import startup


@pytest.fixture
def lines(monkeypatch, tmp_path):
    """What is logged; stages go to a file as on a server."""
    monkeypatch.setenv(startup.FILE, str(tmp_path / "stage"))
    result: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            result.append(record.getMessage())

    before, level = list(startup.logger.handlers), startup.logger.level
    startup.logger.addHandler(Keeper())
    startup.logger.setLevel(logging.INFO)
    yield result
    startup.logger.handlers = before
    startup.logger.setLevel(level)


def test_a_long_step_is_told_at_once_and_while_it_goes_on(lines, monkeypatch):
    monkeypatch.setattr(startup, "PROGRESS_SECONDS", 0.05)
    startup.follow()
    startup.follow()
    with startup.long_step("compiling", "compiling: a minute, kept in /cache"):
        assert lines == ["molehill: compiling: a minute, kept in /cache"]
        assert startup.stage() == "compiling"
        while len(lines) < 3:
            pass
    count = len(lines)
    assert lines[1] == "molehill: compiling: 0 s so far"
    assert startup.stage() == lines[-1].removeprefix("molehill: ")
    assert len(lines) == count


def test_a_step_that_fails_is_told_no_further(lines, monkeypatch):
    monkeypatch.setattr(startup, "PROGRESS_SECONDS", 0.01)
    with pytest.raises(ZeroDivisionError), startup.long_step("dividing", "dividing"):
        1 / 0  # noqa: B018
    before = len(lines)
    assert not any(t.name == "molehill-startup" for t in threading.enumerate())
    assert len(lines) == before


def test_a_stage_comes_from_another_process(lines):
    code = (
        "import logging\n"
        "from molehill.engine.system import startup\n"
        "startup.follow()\n"
        "logger = logging.getLogger('vllm.molehill.kernels')\n"
        "logger.setLevel('INFO')\n"
        "logger.info('molehill: in /a/folder', extra={'stage': 'compiling: 3 of 13'})\n"
        "logger.info('molehill: something else')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert startup.stage() == "compiling: 3 of 13"


def test_without_a_reader_and_with_a_lost_file_nothing_fails(lines, monkeypatch, tmp_path):
    monkeypatch.setenv(startup.FILE, str(tmp_path / "no folder" / "stage"))
    startup.enter("loading")
    assert startup.stage() == ""
    monkeypatch.delenv(startup.FILE)
    startup.enter("loading")
    startup.follow()
    assert startup.stage() == ""
    assert not any(isinstance(h, startup.StageFile) for h in startup.logger.handlers)
    assert os.listdir(tmp_path) == []
