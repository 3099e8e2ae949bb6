"""Adapter roots contain what clients may name."""

import os
from http import HTTPStatus
from pathlib import Path

import pytest
from fastapi.responses import JSONResponse

from molehill.api.adapters.errors import BadPathError, ForbiddenPathError, SourceChangedError
from molehill.api.adapters.source import Source, fingerprint
from molehill.api.http import errors
from molehill.api.sources.roots import AdapterRoots
from molehill.engine.adapter.errors import AdapterNotFoundError, ShapeError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two roots and an outside, each with a directory `a` that holds a file."""
    for name in ("one", "two", "outside"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "file").write_text(name)
    (tmp_path / "two" / "b").mkdir()
    return tmp_path


def resolve_source(tree: Path, text: str) -> Source:
    return AdapterRoots([tree / "one", tree / "two"]).resolve(text)


def resolve(tree: Path, text: str) -> Path:
    return resolve_source(tree, text).directory


def test_a_relative_path_is_below_the_first_root_that_has_it(tree: Path) -> None:
    assert resolve(tree, "a") == tree / "one" / "a"
    assert resolve(tree, "b") == tree / "two" / "b"


def test_an_absolute_path_must_lie_in_a_root(tree: Path) -> None:
    assert resolve(tree, str(tree / "two" / "a")) == tree / "two" / "a"
    with pytest.raises(ForbiddenPathError):
        resolve(tree, str(tree / "outside" / "a"))


def test_dots_may_not_lead_out(tree: Path) -> None:
    assert resolve(tree, "a/../a") == tree / "one" / "a"
    assert resolve(tree, "../two/a") == tree / "two" / "a"
    for text in ("../outside/a", "a/../../outside/a", ".."):
        with pytest.raises(ForbiddenPathError):
            resolve(tree, text)


def test_a_root_whose_name_begins_like_another_directory_does_not_contain_it(tree: Path) -> None:
    (tree / "one-more" / "a").mkdir(parents=True)
    with pytest.raises(ForbiddenPathError):
        resolve(tree, "../one-more/a")


def test_links_may_not_lead_out(tree: Path) -> None:
    (tree / "one" / "inside").symlink_to(tree / "one" / "a")
    assert resolve(tree, "inside") == tree / "one" / "a"
    (tree / "one" / "away").symlink_to(tree / "outside" / "a")
    with pytest.raises(ForbiddenPathError):
        resolve(tree, "away")


def test_what_lies_outside_is_refused_whether_it_exists_or_not(tree: Path) -> None:
    with pytest.raises(ForbiddenPathError):
        resolve(tree, "../outside/no-such")


def test_entries_below_may_not_lead_out(tree: Path) -> None:
    link = tree / "one" / "a" / "deep"
    link.symlink_to(tree / "one")
    assert resolve(tree, "a") == tree / "one" / "a"
    link.unlink()
    link.symlink_to(tree / "outside")
    with pytest.raises(ForbiddenPathError, match=r"^a/deep: "):
        resolve(tree, "a")


def test_links_below_a_linked_directory_may_not_lead_out(tree: Path) -> None:
    """As that of chat templates may be one."""
    shared = tree / "one" / "shared"
    shared.mkdir()
    (tree / "one" / "a" / "templates").symlink_to(shared)
    (shared / "template").symlink_to(tree / "one" / "a" / "file")
    (shared / "back").symlink_to(tree / "one" / "a")
    assert resolve(tree, "a") == tree / "one" / "a"
    (shared / "secret").symlink_to(tree / "outside" / "a" / "file")
    with pytest.raises(ForbiddenPathError, match=r"^a/templates/secret: "):
        resolve(tree, "a")


def test_links_in_a_circle_are_no_trap(tree: Path) -> None:
    (tree / "one" / "a" / "x").symlink_to(tree / "one" / "a" / "y")
    (tree / "one" / "a" / "y").symlink_to(tree / "one" / "a" / "x")
    assert resolve(tree, "a") == tree / "one" / "a"


def test_names_that_are_no_text_can_be_fingerprinted_and_refused(tree: Path) -> None:
    link = Path(os.fsdecode(bytes(tree / "one" / "a") + b"/\xff"))
    link.touch()
    before = resolve_source(tree, "a").fingerprint
    link.unlink()
    link.symlink_to(tree / "outside")
    assert fingerprint(tree / "one" / "a") != before
    with pytest.raises(ForbiddenPathError) as refusal:
        resolve(tree, "a")
    answer = JSONResponse(errors.body(str(refusal.value), refusal.value.kind, HTTPStatus.FORBIDDEN))
    assert b"a/\\\\udcff: a link" in answer.body


def test_pipes_are_refused(tree: Path) -> None:
    os.mkfifo(tree / "one" / "a" / "pipe")
    with pytest.raises(ForbiddenPathError, match="regular file"):
        resolve(tree, "a")


def test_missing_directories_and_files_are_not_found(tree: Path) -> None:
    for text in ("c", "a/file"):
        with pytest.raises(AdapterNotFoundError):
            resolve(tree, text)


@pytest.mark.parametrize("text", ["", "a\0", "a\ud800", "a\n", "x" * 300, "x/" * 4000])
def test_what_is_no_path_is_refused(tree: Path, text: str) -> None:
    with pytest.raises(BadPathError):
        resolve(tree, text)


def test_without_roots_every_path_is_refused() -> None:
    with pytest.raises(ForbiddenPathError, match="--adapter-root"):
        AdapterRoots([]).resolve("a")


def test_errors_are_relabelled_in_every_part() -> None:
    source = Source(Path("/srv/adapters/a"), "a")
    error = ShapeError("/srv/adapters/a/file: t", "/srv/adapters/a", 3)
    relabelled = source.relabel_error(error)
    assert type(relabelled) is ShapeError
    assert str(relabelled) == "a/file: t: found a, expected 3"


@pytest.mark.parametrize("how", ["written", "exchanged", "added", "removed"])
def test_a_source_tells_when_its_files_were_touched(tree: Path, how: str) -> None:
    source = AdapterRoots([tree / "one"]).resolve("a")
    source.check_untouched()
    file = tree / "one" / "a" / "file"
    if how == "written":
        file.write_text("two")
    elif how == "exchanged":
        (tree / "two" / "a" / "file").replace(file)
    elif how == "added":
        (tree / "one" / "a" / "other").touch()
    else:
        file.unlink()
    with pytest.raises(SourceChangedError, match=r"^a: "):
        source.check_untouched()
