"""What clients send: it goes to disk as it comes, in bounds, and is remembered as loads are."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.restarts import Server, play
from support.world import adapter

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import (
    BadPathError,
    BadUploadError,
    BusyError,
    StoreError,
    UploadStalledError,
)
from molehill.api.adapters.source import Source
from molehill.api.adapters.store import AdapterStore
from molehill.api.http import uploads
from molehill.api.http.errors import status_of
from molehill.api.http.uploads import MOST_FIELDS, Form
from molehill.api.sources.fetch import Sources
from molehill.api.sources.roots import AdapterRoots
from molehill.api.sources.uploads import MOST_FILES, UploadedFiles, Uploads
from molehill.engine.formats import native

PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n'


def test_what_has_come_is_on_disk_before_the_rest_is_sent(tmp_path: Path) -> None:
    form = Form(b"b", UploadedFiles(tmp_path))
    form.feed(PART % b"weights")
    for number in range(1, 4):
        form.feed(b"x" * 1_000_000)
        # The parser holds back what could begin a boundary, the file what fills no block.
        assert (tmp_path / "weights").stat().st_size > number * 1_000_000 - 100_000
    with pytest.raises(BadUploadError, match="no end of the form"):
        form.finish()
    form.feed(b"\r\n--b--\r\n")
    form.finish()
    assert (tmp_path / "weights").read_bytes() == b"x" * 3_000_000


def test_bytes_are_the_same_however_they_are_cut(tmp_path: Path) -> None:
    data = bytes(range(256)) * 3 + b"\r\n--b\r\n--bb--\r"
    body = PART.replace(b"--b\r", b"--bound\r") % b"a/b.bin" + data
    body += b'\r\n--bound\r\nContent-Disposition: form-data; name="name"\r\n\r\nm\xc3\xa9\r\n'
    body += b"--bound--\r\n"
    for size in (1, 7, 64, len(body)):
        folder = tmp_path / str(size)
        folder.mkdir()
        form = Form(b"bound", UploadedFiles(folder))
        for start in range(0, len(body), size):
            form.feed(body[start : start + size])
        form.finish()
        assert (folder / "a/b.bin").read_bytes() == data
        assert form.fields == {"name": "m\u00e9"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"a preamble\r\n" + PART % b"a", "Expected boundary"),
        (PART.replace(b"filename=", b"filename*=utf-8''") % b"a", "no filename"),
        (PART % b"\xff", "expected UTF-8"),
    ],
)
def test_forms_that_no_client_writes_are_refused(tmp_path: Path, body: bytes, found: str) -> None:
    with pytest.raises(BadUploadError, match=found):
        Form(b"b", UploadedFiles(tmp_path)).feed(body + b"x\r\n--b--\r\n")


def test_so_many_files_and_no_more(tmp_path: Path) -> None:
    files = UploadedFiles(tmp_path)
    for number in range(MOST_FILES):
        files.begin(str(number))
        files.end()
    with pytest.raises(BadUploadError, match=f"more than {MOST_FILES}"):
        files.begin("last")


def test_so_many_fields_and_no_more(tmp_path: Path) -> None:
    form = Form(b"b", UploadedFiles(tmp_path))
    body = b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n'
    for number in range(MOST_FIELDS):
        form.feed(body % number)
    with pytest.raises(BadUploadError, match=f"more than {MOST_FIELDS}"):
        form.feed(body % MOST_FIELDS)


def test_a_client_that_sends_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SILENCE_SECONDS", 0.01)

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    async def scenario() -> None:
        pieces = body()
        assert await uploads.next_piece(pieces) == b"begun"
        with pytest.raises(UploadStalledError, match="expected the rest") as refusal:
            await uploads.next_piece(pieces)
        assert status_of(refusal.value) == 408

    play(scenario())


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    files = UploadedFiles(tmp_path / ("x" * 300))
    with pytest.raises(StoreError, match="z: the store did not take it"):
        files.begin("z")


def test_so_many_uploads_at_once(tmp_path: Path) -> None:
    bounds = Uploads(AdapterStore(tmp_path), AdmissionLimits(loads=1))
    with bounds.place():
        with pytest.raises(BusyError) as refusal, bounds.place():
            pass
        assert refusal.value.retry_after
    with bounds.place(), bounds.files() as files:
        files.begin("begun")
        assert [path.name for path in files.directory.iterdir()] == ["begun"]
    assert not list(tmp_path.glob(".upload-*"))


def test_nobody_loads_from_where_something_was_sent(tmp_path: Path) -> None:
    with pytest.raises(BadPathError, match="send its files again"):
        Sources(AdapterRoots([tmp_path])).fetch("upload://a")


def test_what_was_sent_is_served_again_and_says_when_it_is_lost(tmp_path: Path) -> None:
    """Nobody can be asked for its files."""

    async def scenario() -> None:
        first = Server(tmp_path)
        with first.world.store.upload_directory() as directory:
            native.write(adapter(1), directory)
            await first.world.load("a", Source(directory, "upload://a"))
        assert first.world.in_store() == [adapter(1).digest, "manifest.json"]
        (first.world.store.root / ".upload-cut-off").mkdir()
        second = first.restarted()
        await second.restore.run()
        assert (second.serves(), second.remembers()) == (first.serves(), first.remembers())
        assert second.world.in_store() == [adapter(1).digest, "manifest.json"]
        third = second.restarted()
        shutil.rmtree(third.world.store.path(adapter(1).digest))
        await third.restore.run()
        assert third.serves() == {}
        failure = third.world.registry.failures["a"]
        assert failure.kind == "store_failed"
        assert "send its files again" in failure.message
        # It is wanted until somebody sends it again or deletes the name.
        assert third.restore.ready
        assert third.remembers().keys() == {"a"}

    play(scenario())
