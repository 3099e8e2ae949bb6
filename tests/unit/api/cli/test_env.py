"""`molehill env --build`, with a compiler, without one, and with one that fails."""

import pytest
from support.fake_compiler import compiler, empty_installation, without_compiler

from molehill.api.cli import env, main
from molehill.kernels.cpu import build


@pytest.fixture
def here(tmp_path, monkeypatch):
    return empty_installation(monkeypatch, tmp_path)[0]


def test_it_tells_what_it_does(here, tmp_path, monkeypatch, capsys):
    compiler(monkeypatch, tmp_path)
    assert env.build_kernels()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("molehill: compiling the C++ kernels, ")
    assert lines[-1] == f"molehill: the C++ kernels are in {here / build.library_name()}"


def test_no_compiler_is_no_failure(here, tmp_path, monkeypatch, capsys):
    without_compiler(monkeypatch, tmp_path)
    assert env.build_kernels()
    assert "the C++ kernels are not built: no C++ compiler" in capsys.readouterr().err


def test_a_compiler_that_fails_is_one(here, tmp_path, monkeypatch, capsys):
    compiler(monkeypatch, tmp_path, fails="scale.cpp")
    assert main.main(["env", "--build"]) == 1
    assert "no such instruction" in capsys.readouterr().err
