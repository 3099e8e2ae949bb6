"""Libraries' lines are JSON where vLLM's are, and as ever where they are not."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pythonjsonlogger.json", reason="vLLM is an extra")

# pytest has handlers of its own on the root logger. argv: whether vLLM logs JSON.
PROCESS = """
import logging, sys, warnings
from pythonjsonlogger.json import JsonFormatter
from molehill.engine.vllm import json_logs

handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(JsonFormatter("%(name)s %(message)s") if sys.argv[1:] else None)
logging.getLogger("vllm").addHandler(handler)
for _ in range(2):
    json_logs.install()
logging.getLogger("some.library").warning("found %d", 3)
warnings.warn("old")
"""


def run(*arguments):
    command = [sys.executable, "-c", PROCESS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_libraries_and_warnings_are_written_as_vllms_lines():
    library, warning = map(json.loads, run("json").stdout.splitlines())
    assert library == {"name": "some.library", "message": "found 3"}
    assert warning["name"] == "py.warnings"
    assert "UserWarning: old" in warning["message"]


def test_text_stays_as_it_is():
    done = run()
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "found 3"
