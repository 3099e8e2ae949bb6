"""How a process ends whose threads do not."""

import subprocess
import sys

PROGRAM = """
import atexit, sys, threading, time
from molehill.engine.system.ending import end_with_status

atexit.register(print, "tidied")
if sys.argv[1] == "works":
    threading.Thread(target=time.sleep, args=(300,)).start()
end_with_status(3, float(sys.argv[2]))
sys.exit(4)
"""


def run(what: str, seconds: float) -> tuple[int, str]:
    command = [sys.executable, "-c", PROGRAM, what, str(seconds)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return ended.returncode, ended.stdout


def test_a_thread_that_works_on_is_left() -> None:
    assert run("works", 0.2) == (3, "tidied\n")


def test_a_process_whose_threads_are_done_ends_by_itself() -> None:
    assert run("rests", 300) == (4, "tidied\n")
