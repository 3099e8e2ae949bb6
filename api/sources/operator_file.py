"""A small file of the operator's, at a path or behind a URL, that may change at any time."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from molehill.api.adapters.errors import FetchError
from molehill.api.sources.fetch import filesystem_options, reason

# A hundred thousand adapters in a line each do not fit; ten thousand do.
MOST_BYTES = 4 << 20

FILE_SECONDS = 1.0
URL_SECONDS = 10.0


class OperatorFile:
    """place: a path, or a URL of https, http, s3 or gs. label: what to call it before clients, who
    get to know neither: a URL may be signed. period: seconds between two looks at it.

    It is read whole each time: a path may lead over links that are exchanged, as in a mounted
    ConfigMap, and not every store says what has changed.
    """

    def __init__(self, place: str, label: str) -> None:
        self._place = place
        self._label = label
        self.is_url = "://" in place
        self.period = URL_SECONDS if self.is_url else FILE_SECONDS
        # One for all looks: to make one takes longer than to read the document.
        self._filesystem: Any = None

    def read(self) -> bytes:
        """All of it. Raises FetchError, also where it is larger than MOST_BYTES."""
        try:
            content = self._from_url() if self.is_url else self._from_file()
        except FetchError:
            raise
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else None
            # A message of the network's has the URL in it.
            cause = why or type(error).__name__ if self.is_url else why or reason(error)
            raise FetchError(f"{self._label}: found {cause}, expected a readable file") from error
        if len(content) > MOST_BYTES:
            raise FetchError(
                f"{self._label}: found more than {MOST_BYTES} bytes, expected at most so many"
            )
        return content

    def _from_file(self) -> bytes:
        with Path(self._place).open("rb") as file:
            return file.read(MOST_BYTES + 1)

    def _from_url(self) -> bytes:
        if self._filesystem is None:
            scheme = urlsplit(self._place).scheme
            options = filesystem_options(scheme)
            self._filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        self._filesystem.invalidate_cache()
        content = b""
        with self._filesystem.open(self._place, "rb", block_size=0) as file:
            while len(content) <= MOST_BYTES and (chunk := file.read(MOST_BYTES + 1)):
                content += chunk
        return content
