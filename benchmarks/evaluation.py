"""How long lm-eval takes on a server and on Transformers, and whether both score alike.

    python benchmarks/evaluation.py MODEL [--adapter PATH] [--repetitions 3]

The number tasks of `tests/data/lm_eval`, in float32: four choices for each of 21 items, and 21
numbers to write. The server is asked by local-completions with token ids and long lists of prompts;
on Transformers the adapter is the reference (`molehill.engine.hf.reference`), which computes expert
by expert, and slowly. They take turns. Before that the base on the server reads some of these
prompts, with and without their log-probabilities. Run it on a machine that does nothing else, from
the repository's root, with the extra `eval`.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx

# The tests start servers too; they are no package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support import evaluation  # type: ignore[import-not-found]
from support.server import serve  # type: ignore[import-not-found]

BATCH, READ = 42, 24
NAMES = ("base", "adapter")


def timed(evaluate: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    scored = evaluate()
    return time.perf_counter() - start, scored


def race(url: str, model: Path, adapter: Path, task: str, repetitions: int) -> Iterator[str]:
    """Server and Transformers in turns: a line for the base, a line for the adapter."""
    for name in NAMES:
        arguments = evaluation.of_server(url, name, model, "completions", timeout=600)
        with evaluation.on_transformers(model, adapter if name == "adapter" else None) as lm:
            asked = partial(evaluation.evaluate, "local-completions", task, arguments)
            sides: dict[str, Callable[[], Any]] = {
                "server": partial(asked, batch_size=BATCH),
                "transformers": partial(evaluation.evaluate, lm, task),
            }
            turns = [
                {side: timed(evaluate) for side, evaluate in sides.items()}
                for _ in range(repetitions)
            ]
        yield f"{task}, {name}: {compared(turns, task)}"


def compared(turns: list[dict[str, tuple[float, Any]]], task: str) -> str:
    ratios = [turn["transformers"][0] / turn["server"][0] for turn in turns]
    shown = []
    for side in ("server", "transformers"):
        seconds = statistics.median(turn[side][0] for turn in turns)
        shown.append(f"{side} {turns[0][side][1].score:.4f} in {seconds:.1f} s")
    served, reference = (turns[0][side][1] for side in ("server", "transformers"))
    answers = [
        scored.chosen if task == evaluation.CHOICE else scored.answers
        for scored in (served, reference)
    ]
    equal = sum(a == b for a, b in zip(*answers, strict=True))
    shown.append(f"{equal} of {len(answers[0])} answers equal")
    shown.append(
        f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if task == evaluation.CHOICE:
        apart = (served.likelihoods - reference.likelihoods).abs().max()
        shown.append(f"log-likelihoods at most {apart:.1e} apart")
    return ", ".join(shown)


def prompts() -> list[str]:
    """What the choices have the server read."""
    items = map(json.loads, (evaluation.TASKS / "numwords.jsonl").read_text().splitlines())
    return [
        f"### Instruction:\nWrite the number {item['number']}.\n\n### Output:\n{choice}"
        for item in items
        for choice in item["choices"]
    ]


def reading(url: str, repetitions: int) -> str:
    """Prompt tokens per second of the base, for one token and with log-probabilities."""
    asked: dict[str, dict[str, Any]] = {
        "no log-probabilities": {},
        "echo, logprobs 1": {"echo": True, "logprobs": 1},
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in asked}
    with httpx.Client(base_url=url, timeout=600) as http:
        # The first turn warms up.
        for turn, kind in itertools.product(range(repetitions + 1), asked):
            body = {"model": "base", "prompt": prompts()[: READ if turn else 2], "max_tokens": 1}
            # Nothing comes from the cache.
            body |= {**asked[kind], "cache_salt": f"{turn}-{kind}"}
            start = time.perf_counter()
            answer = http.post("/v1/completions", json=body).raise_for_status().json()
            seconds = time.perf_counter() - start
            if turn:
                speeds[kind].append(answer["usage"]["prompt_tokens"] / seconds)
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    return ", ".join(f"{kind} {speed:.0f}" for kind, speed in medians.items())


def main() -> None:
    from molehill.benchmarks.host import host

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path, default=Path("demo/adapters/numwords-mixlora"))
    parser.add_argument("--repetitions", type=int, default=3)
    tasks = (evaluation.CHOICE, evaluation.WRITE)
    parser.add_argument("--tasks", nargs="*", choices=tasks, default=tasks)
    args = parser.parse_args()
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    print(host(), flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = ["--dtype=float32", "--enforce-eager", "--max-model-len=2048"]
        arguments += ["--served-model-name=base", f"--adapter=adapter={args.adapter}"]
        server = stack.enter_context(serve(args.model, folder / "log", arguments, warm=True))
        print(f"prompt tokens per second: {reading(server.url, args.repetitions)}", flush=True)
        for task in args.tasks:
            for line in race(server.url, args.model, args.adapter, task, args.repetitions):
                print(line, flush=True)


if __name__ == "__main__":
    main()
