"""An adapter's files in the body of a request (multipart/form-data), on their way to disk."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from molehill.api.adapters.errors import (
    BadUploadError,
    UploadStalledError,
    UploadTooLargeError,
)
from molehill.api.adapters.ingest import fetched, no_memory
from molehill.api.http.dependencies import Services
from molehill.api.sources.uploads import UploadedFiles
from molehill.engine.system.out_of_memory import is_out_of_memory

MULTIPART = "multipart/form-data"
# The form's field of every file.
FILE = "file"

# RFC 2046, section 5.1.1.
BOUNDARY_BYTES = 70
# Given to a thread at a time.
CHUNK = 1 << 20
# Between two pieces of a body.
SILENCE_SECONDS = 30.0
# Of all fields that are no files; there are fewer than ten.
FIELD_BYTES = 64 << 10
MOST_FIELDS = 32


def is_form(request: Request) -> bool:
    kind: str = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == MULTIPART


class Form:
    """Parses a body piece by piece, in any thread. fields: what is no file, by name."""

    def __init__(self, boundary: bytes, files: UploadedFiles) -> None:
        self.fields: dict[str, str] = {}
        self._files = files
        self._ended = False
        self._field_bytes = 0
        # Of the part that is being read: its header, and its text, or None of a file.
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._name = ""
        self._text: bytearray | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._read_header_name,
                "on_header_value": self._read_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._read_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Raises BadUploadError, UnsupportedError, StoreError."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadUploadError(f"body: found {error}, expected {MULTIPART}") from error

    def finish(self) -> None:
        """After the last piece. Raises BadUploadError."""
        if not self._ended:
            raise BadUploadError("body: found no end of the form, expected its last boundary")
        if not len(self._files):
            raise BadUploadError(
                f"{FILE}: found none, expected an adapter's files, each a part `{FILE}` with a "
                "filename"
            )

    def _begin_part(self) -> None:
        self._disposition = b""

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = decoded(options.get(b"name", b""))
        if b"filename" not in options:
            if self._name in (FILE, *self.fields):
                found = "no filename" if self._name == FILE else "it twice"
                raise BadUploadError(f"{self._name[:200]!a}: found {found}, expected one")
            if len(self.fields) >= MOST_FIELDS:
                raise BadUploadError(f"fields: found more than {MOST_FIELDS}, expected so many")
            self._text = bytearray()
        elif self._name == FILE:
            self._text = None
            self._files.begin(decoded(options[b"filename"]))
        else:
            raise BadUploadError(
                f"{self._name[:200]!a}: found a file, expected a value; files are sent as `{FILE}`"
            )

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self._files.write(memoryview(data)[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > FIELD_BYTES:
            raise BadUploadError(
                f"fields: found {self._field_bytes} bytes or more, expected at most {FIELD_BYTES}"
            )
        self._text += data[start:end]

    def _end_part(self) -> None:
        if self._text is None:
            self._files.end()
        else:
            self.fields[self._name] = decoded(self._text)

    def _end(self) -> None:
        self._ended = True


def decoded(text: bytes | bytearray) -> str:
    """Raises BadUploadError."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadUploadError(f"body: found {bytes(text[:100])!r}, expected UTF-8") from error


@asynccontextmanager
async def received(
    request: Request, services: Services
) -> AsyncIterator[tuple[dict[str, str], Path]]:
    """The form's fields, and where its files lie until this is left.

    Raises BusyError, BadUploadError, UploadTooLargeError, UploadStalledError, UnsupportedError,
    StoreError, OutOfMemoryError.
    """
    async with AsyncExitStack() as stack:
        with services.registry.events.refusals():
            # Before anything is read of it.
            check_length(request.headers.get("content-length", ""), services.uploads.limit)
            boundary = boundary_of(request)
            stack.enter_context(services.uploads.place())
            files = await stack.enter_async_context(fetched(services.uploads.files()))
            form = Form(boundary, files)
            await read_into(form, request, services.uploads.limit)
        yield form.fields, files.directory


async def read_into(form: Form, request: Request, limit: int) -> None:
    """Never holds more of the body than a CHUNK and what the server hands on at a time."""
    body, size, pieces = aiter(request.stream()), 0, bytearray()
    try:
        while (piece := await next_piece(body)) is not None:
            size += len(piece)
            check_size(f"{size} bytes or more", size, limit)
            pieces += piece
            if len(pieces) >= CHUNK:
                await asyncio.to_thread(form.feed, bytes(pieces))
                pieces.clear()
        await asyncio.to_thread(form.feed, bytes(pieces))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise no_memory("upload") from None
        raise
    form.finish()


async def next_piece(body: AsyncIterator[bytes]) -> bytes | None:
    """None at the end. Raises BadUploadError, UploadStalledError."""
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            return await anext(body, None)
    except TimeoutError:
        raise UploadStalledError(
            f"body: found nothing for {SILENCE_SECONDS:g} s, expected the rest of it"
        ) from None
    except ClientDisconnect:
        # Nobody reads it, but that it was refused is counted.
        raise BadUploadError("body: found its client gone, expected the rest of it") from None


def check_length(announced: str, limit: int) -> None:
    """Raises UploadTooLargeError."""
    if announced.isdecimal():
        check_size(f"{announced} bytes", int(announced), limit)


def check_size(found: str, size: int, limit: int) -> None:
    if size > limit:
        raise UploadTooLargeError(
            f"body: found {found}, expected at most {limit} bytes (--max-upload-bytes)"
        )


def boundary_of(request: Request) -> bytes:
    """Raises BadUploadError."""
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= BOUNDARY_BYTES:
        found = f"one of {len(boundary)} bytes" if boundary else "none"
        raise BadUploadError(
            f"content-type: boundary: found {found}, expected one of at most {BOUNDARY_BYTES}"
        )
    return boundary


def document_upload(fields: type[BaseModel]) -> dict[str, Any]:
    """The form for the route's documentation. fields: beside the files."""
    schema = fields.model_json_schema()
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    schema["properties"] = {**schema["properties"], FILE: files}
    schema["required"] = [*schema["required"], FILE]
    return {"requestBody": {"content": {MULTIPART: {"schema": schema}}}}
