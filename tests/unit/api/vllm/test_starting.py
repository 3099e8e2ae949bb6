"""What clients are told while the engine starts."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from argparse import Namespace

import httpx
import openai
import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from molehill.api.vllm.starting import StartingServer
from molehill.engine.system import startup

PLAIN = Namespace(ssl_keyfile=None, ssl_certfile=None, ssl_ca_certs=None, ssl_cert_reqs=0)


@pytest.fixture
def bound():
    """A socket as vLLM leaves it while the engine is built: bound, not listening."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock


def url(sock: socket.socket, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"


def ask(address: str, **options) -> httpx.Response:
    """An answer, as soon as somebody listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return httpx.get(address, timeout=10, **options)
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def starting(bound, monkeypatch, tmp_path):
    monkeypatch.setenv(startup.FILE, str(tmp_path / "stage"))
    server = StartingServer(bound, PLAIN)
    ask(url(bound))
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/health", "/health/ready", "/ping"])
def test_probes_are_told_the_stage(bound, starting, path):
    answer = httpx.get(f"{url(bound)}{path}")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    body = answer.json()
    assert (body["status"], body["stage"]) == ("starting", "starting the engine")
    assert body["seconds"] >= 0
    startup.enter("compiling the base model: 20 s so far")
    assert httpx.get(f"{url(bound)}{path}").json()["stage"].startswith("compiling the base model")


def test_a_client_of_the_protocol_gets_its_error(bound, starting):
    startup.enter("loading the base model")
    client = openai.OpenAI(base_url=f"{url(bound)}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="base", prompt="hello")
    assert caught.value.status_code == 503
    assert caught.value.body == {
        "message": "The server is starting: loading the base model.",
        "type": "starting",
        "param": None,
        "code": 503,
    }


def test_no_client_is_refused_when_the_real_server_takes_over(bound, starting):
    async def real(scope, receive, send):
        await PlainTextResponse("served")(scope, receive, send)

    config = uvicorn.Config(real, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    answers, failures, over = [], [], threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            try:
                answers.append(httpx.get(url(bound), timeout=20).status_code)
            except httpx.HTTPError as error:
                failures.append(error)

    clients = [threading.Thread(target=keep_asking) for _ in range(3)]
    for client in clients:
        client.start()
    starting.stop()
    serving = threading.Thread(target=server.run, args=([bound],))
    serving.start()
    served = ask(url(bound))
    while 200 not in answers:
        time.sleep(0.02)
    over.set()
    for client in clients:
        client.join()
    server.should_exit = True
    serving.join()
    assert served.text == "served"
    assert failures == []
    assert set(answers) <= {200, 503}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_over_tls_where_the_server_is(bound, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    subprocess.run([*make, *subject, *files], check=True, capture_output=True)
    args = Namespace(
        ssl_keyfile=str(key), ssl_certfile=str(certificate), ssl_ca_certs=None, ssl_cert_reqs=0
    )
    server = StartingServer(bound, args)
    try:
        verify = ssl.create_default_context(cafile=certificate)
        answer = ask(f"{url(bound, 'https')}/health/ready", verify=verify)
    finally:
        server.stop()
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
