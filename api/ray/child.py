"""`molehill serve` as a replica's child: it ends with its parent, however that ends.

Usage: python -m molehill.api.ray.child PARENT_PID ARGUMENTS...
"""

import os
import signal
import sys
import threading
import time

LOOK_SECONDS = 1.0


def end_with(parent: int) -> None:
    """Waits until another process is this one's parent, then ends it as an operator would."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    from molehill.api.cli.main import main as molehill

    parent, *arguments = sys.argv[1:]
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    return molehill(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main())
