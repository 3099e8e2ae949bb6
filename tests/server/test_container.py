"""The image that the Dockerfile makes: the demo's request as an ordinary user, and its end."""

import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.api_client import TESTS
from support.proxies import found, needs
from support.server import free_port

IMAGE = os.environ.get("MOLEHILL_IMAGE", "")
REPOSITORY = TESTS.parent
MODEL = REPOSITORY / os.environ.get("MOLEHILL_SMOLLM2", ".models/SmolLM2-135M-Instruct")

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        not IMAGE, reason="MOLEHILL_IMAGE names no image made from the Dockerfile, as docs/fleet.md"
    ),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL.name} is not prepared"),
    needs("podman"),
]

START_SECONDS, GRACE_SECONDS = 300, 120
PROMPT = "### Instruction:\n{}\n\n### Output:\n"


def podman(*arguments: str) -> str:
    result = subprocess.run(
        [found("podman"), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"podman {arguments[0]}: {result.stderr[-2000:]}"
    return result.stdout.strip()


def logs(name: str) -> str:
    """Both of its streams, which podman writes to its own."""
    result = subprocess.run(
        [found("podman"), "logs", "--tail", "60", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.stdout


@pytest.fixture(scope="module")
def readable_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """safetensors saves files for their owner alone, who is not the container's user."""
    folder: Path = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(MODEL, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def container(readable_model: Path) -> Iterator[tuple[str, str]]:
    """Its name and its server's URL. Only /tmp, /dev/shm and the user's home can be written to."""
    name, port = f"molehill-test-{uuid.uuid4().hex[:8]}", free_port()
    adapters = {"numwords": "numwords-mixlora", "uppercase": "uppercase-dynmole"}
    try:
        podman(
            *("run", "--detach", "--name", name, "--network", "host", "--shm-size", "1g"),
            *("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
            *("--no-healthcheck", "--tmpfs", "/tmp:rw,exec", "--volume", "/home/molehill"),
            *("--volume", f"{readable_model}:/model:ro"),
            *("--volume", f"{REPOSITORY / 'demo' / 'adapters'}:/adapters:ro"),
            *("--env", "VLLM_CPU_KVCACHE_SPACE=1", IMAGE),
            *("serve", "/model", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"),
            *("--served-model-name=base", "--max-model-len=2048", "--dtype=float32"),
            *(f"--adapter={name}=/adapters/{folder}" for name, folder in adapters.items()),
            "--shutdown-timeout=90",
        )
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(url):
            state = podman("inspect", "--format", "{{.State.Status}}", name)
            assert state == "running", logs(name)
            assert time.monotonic() < deadline, logs(name)
            time.sleep(1)
        yield name, url
    finally:
        subprocess.run(
            [found("podman"), "rm", "--force", "--volumes", name],
            capture_output=True,
            check=False,
        )


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def complete(url: str, model: str, question: str, tokens: int, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT.format(question), "max_tokens": tokens, **more}
    return httpx.post(f"{url}/v1/completions", json={"temperature": 0, **body}, timeout=300)


def test_the_demos_request_is_answered_by_an_ordinary_user(container: tuple[str, str]) -> None:
    name, url = container
    question = "Write the number 305."
    texts = {
        model: complete(url, model, question, 24, stop=["\n", "<|im_end|>"])
        .json()["choices"][0]["text"]
        .strip()
        for model in ("base", "numwords")
    }
    assert texts["numwords"] == "three hundred and five"
    assert "three hundred and five" not in texts["base"]
    assert podman("exec", name, "id", "-u") != "0"
    script = "touch /opt/molehill/x 2>/dev/null || touch /usr/x 2>/dev/null || echo read-only"
    assert podman("exec", name, "sh", "-c", script) == "read-only"
    # The kernels were compiled with the image: nothing is, while it serves.
    assert podman("exec", name, "sh", "-c", "ls -A /home/molehill/.cache/molehill || true") == ""


def test_it_ends_in_its_grace_time_and_finishes_what_runs(container: tuple[str, str]) -> None:
    """Comes last."""
    name, url = container
    answers = []
    asked = threading.Thread(
        target=lambda: answers.append(complete(url, "numwords", "Count.", 64, ignore_eos=True))
    )
    asked.start()
    while not running_requests(url):
        time.sleep(0.05)
    podman("stop", "--time", str(GRACE_SECONDS), name)
    asked.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 64
    state = podman("inspect", "--format", "{{.State.ExitCode}} {{.State.OOMKilled}}", name)
    assert state == "0 false"


def running_requests(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:num_requests_running")
    )
