"""One server per directory, for as long as its process lives.

Not by filelock: it cannot open a directory, and its file would be one more thing in every store.
"""

import fcntl
import logging
import os
import weakref
from pathlib import Path

logger = logging.getLogger("vllm.molehill")


class LockedError(ValueError):
    """A directory that another server works in."""


class DirectoryLock:
    """Held until it is released, collected, or the process ends, however that ends.

    The system keeps it: nothing is written, so a server that was killed leaves nothing behind. On a
    network file system other machines may not see it.
    """

    def __init__(self, directory: Path) -> None:
        """Raises LockedError, OSError where there is no such directory."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise LockedError(
                f"{directory}: found another server that uses it, expected one server for each "
                "adapter store"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked against other servers: %s", directory, error)


def check_free(directory: Path | None) -> None:
    """Raises LockedError if a server works in `directory` now."""
    if directory is not None and directory.is_dir():
        DirectoryLock(directory).release()
