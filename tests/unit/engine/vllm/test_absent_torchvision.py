"""Model files of vLLM that import torchvision, on machines that have none or a broken one."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.golden import TINY_LLAMA, Case

from molehill.engine.vllm import absent_torchvision

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
absent = pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed here")


def python(code: str, *path: Path) -> str:
    """What a process of its own prints; its error output is shown where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


def import_qwens_file() -> None:
    """As a worker does; prints what is said of what torchvision would do."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import_module("vllm.model_executor.models.qwen3_5")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import tvF
    from transformers.utils import is_torchvision_available
    from transformers.utils.import_utils import is_torchvision_v2_available

    assert importlib.util.find_spec("torchvision") is None
    assert not is_torchvision_available()
    assert not is_torchvision_v2_available()
    try:
        assert tvF.resize
    except ImportError as error:
        print(error, flush=True)


@pytest.mark.slow
@absent
def test_qwens_file_imports_and_torchvision_is_known_to_be_absent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = warm.run(import_qwens_file, log)
    process.wait(60)
    assert process.returncode == 0, log.read_text()[-2000:]
    message = log.read_text().splitlines()[-1]
    assert message.startswith("torchvision.transforms.v2.functional.resize: torchvision is not")
    assert "its build for torch 2." in message


@absent
def test_what_stands_in_has_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision.transforms.v2", "torchvision.transforms.v2.functional"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    absent_torchvision.install()
    absent_torchvision.install()
    from torchvision.transforms.v2 import functional

    assert isinstance(functional, absent_torchvision.Missing)
    assert not hasattr(functional, "__file__")
    with pytest.raises(ImportError, match=r"v2\.InterpolationMode: torchvision is not installed"):
        from torchvision.transforms.v2 import InterpolationMode  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import torchvision  # noqa: F401


def fake(directory: Path, body: str) -> Path:
    """A directory with a torchvision in it, and what its metadata would be."""
    package = directory / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    metadata = directory / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    return directory


@pytest.mark.slow
def test_a_torchvision_that_works_is_left_alone(tmp_path: Path) -> None:
    code = """
import sys
from molehill.engine.system.torchvision import check_importable
from molehill.engine.vllm import absent_torchvision
check_importable()
absent_torchvision.install()
import torchvision
assert "torchvision.transforms.v2" not in sys.modules
print(torchvision.__name__)
"""
    assert python(code, fake(tmp_path, "")) == "torchvision"


# What PyPI's torchvision does beside a CPU build of torch, whose library it cannot load.
BROKEN = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda: None)\n"


# Each command's last line and status, of one process: what is imported once is imported for all.
COMMANDS = """
import contextlib, io, json, sys
from molehill.api.cli.main import main
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(arguments)
    print(json.dumps([status, said.getvalue().splitlines()[-1]]))
"""


@pytest.mark.slow
def test_what_to_do_about_a_torchvision_for_another_torch_is_said(tmp_path: Path) -> None:
    lora, model = str(Case("lora").path), str(TINY_LLAMA)
    commands = {
        ("serve", "m"): 2,
        ("inspect", lora, "--model", model): 1,
        ("merge", lora, str(tmp_path / "new"), "--model", model): 2,
    }
    environment = {**os.environ, "PYTHONPATH": str(fake(tmp_path, BROKEN))}
    result: Any = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(list(commands))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert [status for status, _ in answers] == list(commands.values())
    for _, message in answers:
        assert "torchvision 0.1 is installed and cannot be imported beside torch" in message
        assert "operator torchvision::nms does not exist" in message
        assert "`pip uninstall torchvision`" in message
