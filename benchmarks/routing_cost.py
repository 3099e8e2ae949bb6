"""What telling a request's routing costs: decoding with and without it, by turns, in one engine.

    python benchmarks/routing_cost.py .models/SmolLM2-135M-Instruct demo/adapters/uppercase-dynmole

A batch decodes; then the same batch does, all of whose requests ask for experts and weights, which
the workers are asked for at the end of each turn. Which comes first alternates. The prompts are a
few tokens, so that it is decoding that is measured. Run it on a machine that does nothing else: a
ratio's spread says what it is worth.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molehill.benchmarks.contestants import MOLEHILL, Contestant
from molehill.benchmarks.engines import running
from molehill.benchmarks.host import host
from molehill.engine.vllm import protocol
from molehill.engine.vllm.routing_capture import ASKED

PROMPT = tuple(range(5, 13))


def decode(llm: Any, request: Any, batch: int, tokens: int, asks: bool) -> tuple[float, int]:
    """Tokens per second, and bytes of the answer."""
    from vllm import SamplingParams

    asked = {"key": "turn", "tokens": len(PROMPT) + tokens, "weights": True, "n": 1}
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={ASKED: {**asked, "key": f"turn-{i}"}} if asks else None,
        )
        for i in range(batch)
    ]
    start = time.perf_counter()
    llm.generate(
        [{"prompt_token_ids": list(PROMPT)}] * batch,
        parameters,
        lora_request=[request] * batch,
        use_tqdm=False,
    )
    answer_bytes = sum(take(llm, f"turn-{i}", tokens) for i in range(batch)) if asks else 0
    return batch * tokens / (time.perf_counter() - start), answer_bytes


def take(llm: Any, key: str, tokens: int) -> int:
    part = protocol.TokenRange(0, 0, len(PROMPT) + tokens - 1)
    asked = protocol.to_wire(protocol.RoutesRequest(key, (part,), forget=True))
    answers = llm.collective_rpc(protocol.ROUTES.method, args=(asked,))
    (routes,) = protocol.ROUTES.replies(answers)[0].parts
    return len(routes.experts) + len(routes.weights)


def measure(args: argparse.Namespace, llm: Any, request: Any) -> dict[str, Any]:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    answer_bytes = 0
    for turn in range(-1, args.turns):
        for asks in (False, True) if turn % 2 else (True, False):
            speed, size = decode(llm, request, args.batch, args.tokens, asks)
            answer_bytes = max(answer_bytes, size)
            if turn >= 0:
                speeds[asks].append(speed)
    ratios = [on / off for on, off in zip(speeds[True], speeds[False], strict=True)]
    return {
        "batch": args.batch,
        "tokens": args.tokens,
        "answer_bytes": answer_bytes,
        "off": speeds[False],
        "on": speeds[True],
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(arguments)
    contestants = [Contestant("mixture", MOLEHILL, (args.adapter,))]
    options = {"max_model_len": 256, "enforce_eager": True}
    with running(args.model, contestants, options, weights=0, itemsize=2) as engines:
        from vllm.lora.request import LoRARequest

        llm, request = engines[MOLEHILL], LoRARequest("mixture", 1, str(args.adapter))
        llm.llm_engine.add_lora(request)
        print(json.dumps({**host(), **measure(args, llm, request)}, indent=2))


if __name__ == "__main__":
    main()
