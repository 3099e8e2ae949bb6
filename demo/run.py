"""Serves SmolLM2 with the two demo adapters and asks base and adapters the same, in one batch.

Usage: python demo/run.py MODEL [--once] [--port PORT]
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ADAPTERS = {
    "uppercase": HERE / "adapters" / "uppercase-dynmole",
    "numwords": HERE / "adapters" / "numwords-mixlora",
}
QUESTIONS = (
    "Write the number 305.",
    "Write the number 42.",
    "What is the opposite of tall?",
    "Describe the sun in one sentence.",
)
# What the adapters were trained on, and where their answers end.
PROMPT = "### Instruction:\n{}\n\n### Output:\n"
STOP = ["\n", "<|im_end|>"]
START_TIMEOUT = 600
console = Console()


@dataclass(frozen=True)
class Answer:
    """One completion: who gave it, its text, tokens and seconds."""

    model: str
    question: str
    text: str
    tokens: int
    seconds: float


def start_server(model: Path, port: int) -> subprocess.Popen[bytes]:
    """`molehill serve` as anyone would start it; its log goes to demo/server.log."""
    command = [
        str(Path(sys.executable).parent / "molehill"),
        "serve",
        str(model),
        "--served-model-name=base",
        f"--port={port}",
        "--host=127.0.0.1",
        "--max-model-len=2048",
        "--enforce-eager",  # starts in half the time; leave it out in production
        *(f"--adapter={name}={path}" for name, path in ADAPTERS.items()),
    ]
    console.print(f"[dim]$ {' '.join(command)}[/dim]")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with (HERE / "server.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Returns when /health answers; exits with the end of the log when the server did."""
    deadline = time.monotonic() + START_TIMEOUT
    with console.status("starting the server (log: demo/server.log)"):
        while time.monotonic() < deadline:
            if server.poll() is not None:
                console.print((HERE / "server.log").read_text()[-3000:], markup=False)
                sys.exit(f"the server ended with status {server.returncode}")
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
    sys.exit(f"the server was not ready after {START_TIMEOUT} s")


async def ask(client: AsyncOpenAI, model: str, question: str) -> Answer:
    start = time.perf_counter()
    completion = await client.completions.create(
        model=model, prompt=PROMPT.format(question), max_tokens=24, temperature=0, stop=STOP
    )
    tokens = completion.usage.completion_tokens if completion.usage else 0
    text = completion.choices[0].text.strip()
    return Answer(model, question, text, tokens, time.perf_counter() - start)


async def ask_all(url: str) -> tuple[list[Answer], float]:
    """Every question to base and adapters at once: one mixed batch. Answers and seconds."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asks = [ask(client, model, q) for q in QUESTIONS for model in ("base", *ADAPTERS)]
        start = time.perf_counter()
        answers = await asyncio.gather(*asks)
    return answers, time.perf_counter() - start


def show_answers(answers: list[Answer], seconds: float) -> None:
    models = ("base", *ADAPTERS)
    table = Table("question", *models, title="One batch: base, DynMoLE and MixLoRA side by side")
    by_pair = {(a.question, a.model): a for a in answers}
    for question in QUESTIONS:
        table.add_row(question, *(by_pair[question, model].text for model in models))
    console.print(table)
    tokens = sum(answer.tokens for answer in answers)
    speed = f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
    console.print(f"{len(answers)} requests in one batch, {speed}\n")


def routing_counters(url: str) -> dict[tuple[str, str], float]:
    """Routing counters from /metrics, by (metric, adapter); experts are summed."""
    counters: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("molehill_") and "adapter" in sample.labels:
                key = (sample.name, sample.labels["adapter"])
                counters[key] = counters.get(key, 0) + sample.value
    return counters


def show_routing(url: str) -> None:
    counters = routing_counters(url)
    table = Table(
        "adapter", "tokens", "router decisions", "experts per decision", "soft", "mean entropy",
        title="Routing counters from /metrics",
    )  # fmt: skip
    for adapter in ADAPTERS:
        decisions = counters["molehill_router_decisions_total", adapter]
        table.add_row(
            adapter,
            f"{counters['molehill_adapter_tokens_total', adapter]:.0f}",
            f"{decisions:.0f}",
            f"{counters['molehill_experts_activated_total', adapter] / decisions:.2f}",
            f"{counters['molehill_soft_routed_total', adapter] / decisions:.1%}",
            f"{counters['molehill_router_entropy_sum', adapter] / decisions:.3f}",
        )
    console.print(table)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--once", action="store_true", help="exit instead of serving on")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}"
    server = start_server(args.model, args.port)
    try:
        wait_until_ready(server, url)
        show_answers(*asyncio.run(ask_all(url)))
        show_routing(url)
        if not args.once:
            console.print(
                f"\nServing at {url}/v1 (models: base, {', '.join(ADAPTERS)}). Ctrl-C ends."
            )
            server.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        stop(server)


if __name__ == "__main__":
    main()
