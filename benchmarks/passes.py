"""What X-LoRA's second pass and room for added tokens cost a step: decoding by turns.

    python benchmarks/passes.py .models/SmolLM2-135M-Instruct [--batch 8] [--tokens 32] [--turns 5]

Two engines of one model, side by side: `plain`, and `room`, which has `--extra-vocab` ids after the
vocabulary and serves X-LoRA. A batch decodes in each as the base; in `room` as an X-LoRA of random
weights too (rank 8 on all projections), and as the same one with `non_granular_after` 0. Who comes
first alternates. The prompts are a few tokens, so that it is decoding that is measured. Run it on a
machine that does nothing else: a ratio's spread says what it is worth.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from molehill.benchmarks import engines
from molehill.benchmarks.host import host
from molehill.benchmarks.synthetic import experts
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import ClassifierMixture

PROMPT = tuple(range(5, 13))
RANK = 8
# By arm, the engine and the adapter. Each is compared with the base of `plain`.
ARMS = {
    "base": ("plain", None),
    "base, room for added tokens": ("room", None),
    "X-LoRA": ("room", "exact"),
    "X-LoRA, scalings kept": ("room", "kept"),
}


def x_lora(base: BaseModel, number: int, hidden: int) -> Adapter:
    """Random, with a classifier of one layer."""
    generator = torch.Generator().manual_seed(0)
    mixtures = {
        site: ClassifierMixture(experts(shape, number, RANK, generator), place)
        for place, (site, shape) in enumerate(base.linears.items())
    }
    outputs = len(mixtures) * number
    weight = torch.randn(outputs, hidden, generator=generator) / hidden**0.5
    layers = ((weight, torch.zeros(outputs)),)
    classifier = Classifier(layers, number, len(mixtures), layerwise=True)
    return Adapter("xlora", mixtures, classifier=classifier)


def save(model: str, number: int, folder: Path) -> dict[str, Path]:
    """Its scalings exact, and kept from the prompt on."""
    from molehill.engine.hf.shapes import base_model

    base = base_model(model)
    hidden = base.vocabulary["embed_tokens"][1]
    exact = x_lora(base, number, hidden)
    assert exact.classifier is not None
    kept = replace(exact, classifier=replace(exact.classifier, non_granular_after=0))
    paths = {}
    for name, adapter in (("exact", exact), ("kept", kept)):
        paths[name] = folder / name
        native.write(adapter, paths[name])
    return paths


def start(args: argparse.Namespace, name: str, vocabulary: int) -> Any:
    from vllm import LLM

    from molehill.engine.vllm.compilation import WORKER
    from molehill.engine.vllm.settings import Settings

    engines.progress(f"starting {name}")
    extra = args.extra_vocab if name == "room" else 0
    settings = Settings(extra_vocab=extra, xlora=name == "room")
    return LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=256,
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        worker_cls=WORKER,
        hf_overrides={"vocab_size": vocabulary + extra},
        additional_config=settings.to_config(),
    )


def decode(llm: Any, request: Any, batch: int, tokens: int) -> float:
    """Tokens per second."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [*PROMPT, 13 + i]} for i in range(batch)]
    start_time = time.perf_counter()
    llm.generate(prompts, sampling, lora_request=[request] * batch, use_tqdm=False)
    return batch * tokens / (time.perf_counter() - start_time)


def measure(
    args: argparse.Namespace, running: Mapping[str, Any], requests: Mapping[str, Any]
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(-1, args.turns):
        for arm in list(ARMS) if turn % 2 else list(ARMS)[::-1]:
            engine, adapter = ARMS[arm]
            request = None if adapter is None else requests[adapter]
            speed = decode(running[engine], request, args.batch, args.tokens)
            if turn >= 0:
                speeds[arm].append(speed)
    pairs = {arm: zip(speeds[arm], speeds["base"], strict=True) for arm in ARMS}
    ratios = {arm: [one / base for one, base in pair] for arm, pair in pairs.items()}
    return {
        arm: {
            "tokens_per_second": statistics.median(speeds[arm]),
            "of_the_base": statistics.median(ratios[arm]),
            "least": min(ratios[arm]),
            "most": max(ratios[arm]),
        }
        for arm in ARMS
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--extra-vocab", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(arguments)
    from transformers import AutoConfig
    from vllm.lora.request import LoRARequest

    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    with tempfile.TemporaryDirectory() as folder:
        paths = save(args.model, args.experts, Path(folder))
        requests = {
            name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(paths.items(), 1)
        }
        running: dict[str, Any] = {}
        try:
            for name in ("plain", "room"):
                running[name] = start(args, name, vocabulary)
            for request in requests.values():
                running["room"].llm_engine.add_lora(request)
            result = measure(args, running, requests)
        finally:
            for llm in running.values():
                llm.llm_engine.engine_core.shutdown()
    print(json.dumps({**host(), "arguments": vars(args), "arms": result}, indent=2))


if __name__ == "__main__":
    main()
