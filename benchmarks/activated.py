"""What activated adapters save: the base has read a document, then adapters are asked about it.

    python benchmarks/activated.py MODEL [--tokens 1800] [--repetitions 5] [--chains 3]

One server with LoRAs of random weights on all projections, each twice: as plain ones, and with
invocation tokens. By repetition, on a document that is new:

* time to first token of the document and an invocation, as the plain and as the activated LoRA,
  after the base has read the document; and the prompt tokens that came from the cache;
* a chain of five adapters on one conversation, each asked after the answers of those before it:
  seconds until the last answer, and the sum of times to first token.

Documents differ in length, by a block of the cache from the shortest to the longest, for what is
left over of the last block is read again. Run it on a machine that does nothing else.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

# The tests start servers too; they are no package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support.server import serve  # type: ignore[import-not-found]

CHAIN, RANK, ANSWER = 5, 16, 16
# vLLM's own on CPU.
BLOCK = 128
# A seed: the warm-up has no document in common with what is measured.
WARM_UP = 1 << 20
KINDS = ("plain", "activated")


@dataclass(frozen=True)
class TimedAnswer:
    """first, last: seconds until the first token and the last one. cached: prompt tokens."""

    first: float
    last: float
    tokens: list[int]
    cached: int


@dataclass(frozen=True)
class FirstTokens:
    """Seconds to the first token after a prompt, by kind, and its tokens that were cached."""

    prompt: int
    seconds: dict[str, float]
    cached: dict[str, int]


@dataclass(frozen=True)
class Chains:
    """Of one conversation, by kind: seconds in all, and the sum of those to first tokens."""

    seconds: dict[str, float]
    firsts: dict[str, float]


def ask(http: httpx.Client, model: str, prompt: list[int], tokens: int) -> TimedAnswer:
    body = {
        **{"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0},
        **{"ignore_eos": True, "return_token_ids": True, "stream": True},
        "stream_options": {"include_usage": True},
    }
    start, first, ids, cached = time.perf_counter(), 0.0, list[int](), 0
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for chunk in chunks(answer):
            if chunk["choices"]:
                first = first or time.perf_counter() - start
                ids += chunk["choices"][0]["token_ids"]
            elif chunk["usage"]:
                cached = (chunk["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    if len(ids) != tokens:
        raise RuntimeError(f"{model}: found {len(ids)} tokens, expected {tokens}")
    return TimedAnswer(first, time.perf_counter() - start, ids, cached)


def chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


class Conversation:
    """Documents of random tokens; invocations: of each adapter of the chain."""

    def __init__(self, http: httpx.Client, invocations: Sequence[list[int]], words: range) -> None:
        self._http, self._invocations, self._words = http, invocations, words

    def document(self, length: int, seed: int) -> list[int]:
        """A new one, which the base has read."""
        generator = random.Random(seed)
        document = [generator.choice(self._words) for _ in range(length)]
        ask(self._http, "base", document, 1)
        return document

    def firsts(self, length: int, seed: int) -> FirstTokens:
        prompt = [*self.document(length, seed), *self._invocations[0]]
        answers = {kind: ask(self._http, f"{kind}-0", prompt, 1) for kind in order(seed)}
        return FirstTokens(
            len(prompt),
            {kind: answer.first for kind, answer in answers.items()},
            {kind: answer.cached for kind, answer in answers.items()},
        )

    def chains(self, length: int, seed: int) -> Chains:
        document = self.document(length, seed)
        chains = {kind: self.chain(kind, document) for kind in order(seed)}
        return Chains(
            {kind: sum(answer.last for answer in chain) for kind, chain in chains.items()},
            {kind: sum(answer.first for answer in chain) for kind, chain in chains.items()},
        )

    def chain(self, kind: str, document: list[int]) -> list[TimedAnswer]:
        conversation, answers = list(document), []
        for number, invocation in enumerate(self._invocations):
            conversation += invocation
            answers.append(ask(self._http, f"{kind}-{number}", conversation, ANSWER))
            conversation += answers[-1].tokens
        return answers


def order(seed: int) -> list[str]:
    return sorted(KINDS, reverse=bool(seed % 2))


def save_adapters(model: Path, folder: Path, invocations: Sequence[list[int]]) -> None:
    """`<folder>/<kind>-<number>`: the same weights, with and without an invocation."""
    from molehill.benchmarks import synthetic
    from molehill.engine.formats import native
    from molehill.engine.hf.shapes import base_model

    base = base_model(model)
    for number, invocation in enumerate(invocations):
        plain = synthetic.lora(base, RANK, number)
        native.write(plain, folder / f"plain-{number}")
        activated = replace(plain, invocation_tokens=tuple(invocation))
        native.write(activated, folder / f"activated-{number}")


def report(firsts: Sequence[FirstTokens], chains: Sequence[Chains]) -> list[str]:
    lines = []
    if firsts:
        lines.append(f"time to first token: {compared([turn.seconds for turn in firsts])}")
    if chains:
        lines.append(f"chain of {CHAIN}: {compared([turn.seconds for turn in chains])}")
        summed = compared([turn.firsts for turn in chains])
        lines.append(f"sum of times to first token in a chain: {summed}")
    for turn in firsts:
        cached = ", ".join(f"{kind} {turn.cached[kind]}" for kind in KINDS)
        lines.append(f"prompt of {turn.prompt} tokens, cached: {cached}")
    return lines


def compared(turns: Sequence[dict[str, float]]) -> str:
    """turns: seconds by kind."""
    ratios = [turn["plain"] / turn["activated"] for turn in turns]
    medians = {kind: statistics.median(turn[kind] for turn in turns) for kind in KINDS}
    shown = ", ".join(f"{kind} {median:.3f} s" for kind, median in medians.items())
    return (
        f"{shown}; plain / activated: median {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} repetitions)"
    )


def lengths(tokens: int, repetitions: int, block: int) -> list[int]:
    """Around `tokens`, over a block."""
    steps = (block * (2 * i + 1) // (2 * repetitions) for i in range(repetitions))
    return [tokens - block // 2 + step for step in steps]


def main() -> None:
    from molehill.benchmarks.host import host

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1800, help="of a document, on average")
    parser.add_argument("--repetitions", type=int, default=5, help="of one prompt")
    parser.add_argument("--chains", type=int, default=3, help="repetitions of the chain")
    parser.add_argument("--block-size", type=int, default=BLOCK)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    invocations = [[300 + i, 400, 500 + i, 600] for i in range(CHAIN)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_adapters(args.model, folder / "root", invocations)
        names = [f"{kind}-{number}" for kind in KINDS for number in range(CHAIN)]
        options = [
            *(
                "--max-model-len",
                "4096",
                "--block-size",
                str(args.block_size),
                "--served-model-name",
                "base",
            ),
            *("--max-loras", str(2 * len(names)), "--enable-prompt-tokens-details"),
            *(part for name in names for part in ("--adapter", f"{name}={folder / 'root' / name}")),
            *([] if args.compiled else ["--enforce-eager"]),
        ]
        with serve(args.model, folder / "log", options) as server:
            print(host(), flush=True)
            with httpx.Client(base_url=server.url, timeout=600) as http:
                conversation = Conversation(http, invocations, range(1000, 40000))
                conversation.firsts(2 * args.block_size, WARM_UP)
                firsts, chains = [], []
                documents = lengths(args.tokens, args.repetitions, args.block_size)
                for seed, length in enumerate(documents):
                    firsts.append(conversation.firsts(length, seed))
                    print(firsts[-1], flush=True)
                documents = lengths(args.tokens, args.chains, args.block_size)
                for seed, length in enumerate(documents, args.repetitions):
                    chains.append(conversation.chains(length, seed))
                    print(chains[-1], flush=True)
        print("\n".join(report(firsts, chains)))


if __name__ == "__main__":
    main()
