"""Whole-engine throughput: mixtures beside the plain base and vLLM's own LoRA, in one run.

Arms run in turn on the same prompts, over several repetitions, on up to four engines that live side
by side (idle ones wait). Ratios are taken within a repetition. Decode speed counts from the first
to the last token of a batch, prefill from the call to the first token. An arm that takes more than
--budget seconds for a workload is stopped there and left out of it; the result says so.

Usage: python benchmarks/engine.py MODEL [--repetitions N] [--output DIRECTORY] [--arms a,b,...]
    [--points a,b,...] [--budget SECONDS] [--dtype auto] [--eager]
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

EXPERTS, RANK, MANY = 8, 8, 32
# vLLM's own LoRA reads a prompt at some 20 tokens/s on CPU: it gets short prompts and few tokens.
SHORT, FEW = 16, 12
# Seconds for one arm, one workload, one repetition.
BUDGET = 120.0
# Spread of the routers' logits. At 1 DynMoLE chooses about 4 of 8 experts, and a quarter of its
# decisions is soft (what was counted is printed with the results).
SHARPNESS = 1.0

ARMS = {
    "a": "plain vLLM, base",
    "b": "molehill, base requests",
    "c": "vLLM's own LoRA, rank 64",
    "d": "molehill, DynMoLE 8 x r 8",
    "e": "molehill, MixLoRA top-2 of 8 x r 8",
    "f": "molehill, DynMoLE, 32 adapters",
    "g": "molehill, LoRA rank 64 merged into the base",
}


@dataclass(frozen=True)
class Point:
    """One workload: `batch` prompts of `prompt` tokens, `tokens` generated each."""

    name: str
    batch: int
    prompt: int
    tokens: int

    @property
    def is_prefill(self) -> bool:
        return self.tokens == 1


POINTS = (
    Point("decode, batch 1", 1, 16, 48),
    Point("decode, batch 8", 8, 16, 48),
    Point("decode, batch 32", 32, 16, 32),
    Point("decode, batch 2, 1k context", 2, 1000, 32),
    Point("prefill, 4 x 512", 4, 512, 1),
    Point("prefill, 1 x 128", 1, 128, 1),
)


@dataclass(frozen=True)
class Sample:
    """tokens per second of one arm at one point in one repetition."""

    arm: str
    point: str
    repetition: int
    speed: float


class OverBudgetError(Exception):
    """An arm took too long for a workload and was stopped."""


def progress(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


@contextmanager
def running_engines(
    model: str, arms: str, lora: Path, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The engines that the arms need, all compiled but vLLM's own LoRA (it cannot be, on CPU).

    lora: what is merged into the base weights of the last one. options: of every engine.
    """
    from vllm import LLM

    from molehill.engine.vllm import compilation
    from molehill.engine.vllm.settings import Settings

    compilation.lift_gate()
    common: dict[str, Any] = {
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "max_num_seqs": 64,
        **options,
    }
    worker = {"worker_cls": compilation.WORKER, "enable_lora": True, "max_loras": 40}
    stock = {"enable_lora": True, "max_lora_rank": EXPERTS * RANK}
    merged_base = {"additional_config": Settings(merged_base=str(lora)).to_config()}
    options_by_engine: dict[str, dict[str, Any]] = {
        "plain": {},
        "molehill": worker,
        "lora": stock,
        "merged": {**worker, **merged_base},
    }
    engines: dict[str, Any] = {}
    try:
        for name in dict.fromkeys(map(engine_of, arms)):
            progress(f"starting engine {name!r}")
            engines[name] = LLM(model, **common, **options_by_engine[name])
        yield engines
    finally:
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()


@cache
def adapter_options(model: str) -> dict[str, Any]:
    """What every mixture of the run has in common."""
    from molehill.benchmarks import synthetic
    from molehill.engine.hf.shapes import base_model

    return {
        "base": base_model(model),
        "number": EXPERTS,
        "rank": RANK,
        "sharpness": SHARPNESS,
        "sizes": synthetic.input_sizes(model),
    }


def make_requests(
    engines: dict[str, Any], arms: str, model: str, folder: Path, lora: Path
) -> dict[str, list[Any]]:
    """LoRARequests by arm; a batch takes them in turn. lora: of the arms with a plain one."""
    from vllm.lora.request import LoRARequest

    from molehill.benchmarks import synthetic

    options = adapter_options(model)
    number = MANY if "f" in arms else 1 if "d" in arms else 0
    many = [
        LoRARequest(
            f"dynmole-{seed}",
            seed + 1,
            str(synthetic.save(synthetic.dynmole, folder / f"d{seed}", **options, seed=seed)),
        )
        for seed in range(number)
    ]
    requests: dict[str, list[Any]] = {"a": [None], "b": [None], "d": many[:1], "f": many}
    requests["c"] = requests["g"] = [LoRARequest("lora", 1, str(lora))]
    if "e" in arms:
        mixlora = synthetic.save(synthetic.mixlora, folder / "e", **options, seed=0)
        requests["e"] = [LoRARequest("mixlora", MANY + 1, str(mixlora))]
    for arm in arms:
        for request in requests[arm]:
            if request is not None:
                engines[engine_of(arm)].llm_engine.add_lora(request)
    return requests


def engine_of(arm: str) -> str:
    return {"a": "plain", "c": "lora", "g": "merged"}.get(arm, "molehill")


def generate(
    llm: Any, prompts: Sequence[Any], sampling: Any, loras: Sequence[Any], budget: float
) -> list[Any]:
    """As LLM.generate, stopped with OverBudgetError at the first step that ends after `budget`
    seconds."""
    end = time.perf_counter() + budget
    names = llm.enqueue(prompts, sampling, lora_request=loras, use_tqdm=False)
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in llm.llm_engine.step() if output.finished]
        if time.perf_counter() > end and llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.abort_request(names, internal=True)
            raise OverBudgetError
    return outputs


def measure(
    llm: Any, point: Point, requests: Sequence[Any], seed: int, budget: float = BUDGET
) -> float:
    """Tokens per second: generated ones, or prompt tokens of a prefill point."""
    from vllm import SamplingParams

    dice = random.Random(seed)
    vocabulary = min(40000, llm.llm_engine.model_config.get_vocab_size())
    prompts = [
        {"prompt_token_ids": [dice.randrange(100, vocabulary) for _ in range(point.prompt)]}
        for _ in range(point.batch)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=point.tokens, ignore_eos=True)
    loras = [requests[i % len(requests)] for i in range(point.batch)]
    start = time.perf_counter()
    outputs = generate(llm, prompts, sampling, loras, budget)
    seconds = time.perf_counter() - start
    if point.is_prefill:
        return point.batch * point.prompt / seconds
    first = max(output.metrics.first_token_ts for output in outputs)
    last = max(output.metrics.last_token_ts for output in outputs)
    return float(point.batch * (point.tokens - 1) / (last - first))


def run(
    engines: dict[str, Any],
    requests: dict[str, list[Any]],
    arms: str,
    points: Sequence[Point],
    repetitions: int,
    budget: float = BUDGET,
) -> tuple[list[Sample], list[str]]:
    """The samples, and what was stopped: it is left out from then on."""
    samples: list[Sample] = []
    stopped: dict[tuple[str, str], str] = {}
    for repetition in range(-1, repetitions):  # the first one warms up
        for point, arm in product(points, arms):
            if (arm, point.name) in stopped or (arm == "c" and point.prompt > SHORT):
                continue
            llm = engines[engine_of(arm)]
            tokens = min(point.tokens, FEW) if arm == "c" else point.tokens
            short = replace(point, tokens=tokens)
            where = f"{repetition if repetition >= 0 else 'warm-up':7} {point.name:28} {arm}"
            try:
                speed = measure(llm, short, requests[arm], repetition, budget)
            except OverBudgetError:
                work = f"{point.batch} x ({point.prompt} + {tokens}) tokens"
                stopped[arm, point.name] = (
                    f"{arm}, {point.name}: stopped in repetition {repetition}, "
                    f"{work} take more than {budget:.0f} s"
                )
                progress(f"{where} stopped after {budget:.0f} s and left out")
                continue
            progress(f"{where} {speed:9.1f}")
            if repetition >= 0:
                samples.append(Sample(arm, point.name, repetition, speed))
    return samples, list(stopped.values())


def ratios(samples: list[Sample], arm: str, over: str, point: str) -> list[float]:
    """Speed of `arm` over speed of `over`, repetition by repetition."""
    speeds = {(s.arm, s.repetition): s.speed for s in samples if s.point == point}
    return [
        speeds[arm, r] / speeds[over, r]
        for r in sorted({s.repetition for s in samples})
        if (arm, r) in speeds and (over, r) in speeds
    ]


def routing(engines: dict[str, Any], requests: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """Mean experts per decision and share of soft decisions, as the workers counted."""
    from molehill.engine.vllm import protocol

    asked = protocol.to_wire(protocol.StatsRequest())
    answers = engines["molehill"].collective_rpc(protocol.STATS.method, args=(asked,))
    (reply,) = protocol.STATS.replies(answers)
    result = {}
    for arm in set(requests) & set("de"):
        if not requests[arm]:
            continue
        stats = reply.adapters[requests[arm][0].lora_int_id].stats
        decisions = stats.decisions
        if decisions:
            chosen, soft = sum(stats.expert_tokens), stats.soft
            result[arm] = {"experts": chosen / decisions, "soft": soft / decisions}
    return result


def limits(model: str) -> dict[str, float]:
    """Decode speed over the base's that the bytes of each adapter allow: all experts, two of 8."""
    from molehill.benchmarks import synthetic

    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    result = {}
    for arm, make in (("d", synthetic.dynmole), ("e", synthetic.mixlora)):
        adapter = make(**adapter_options(model), seed=0)
        for name, share in (("all experts", 1.0), ("2 of 8", 2 / EXPERTS)):
            touched = synthetic.touched_bytes(adapter, share)
            result[f"{arm}, {name}"] = weights / (weights + touched)
    return result


def many_limit(model: str, samples: list[Sample], experts: float) -> float:
    """Speed of 32 adapters over one at batch 32 that bytes allow, at the bandwidth seen at batch 1.

    experts: that a token chooses on average; every row of the batch reads its own adapter's.
    """
    from molehill.benchmarks import synthetic

    def best(arm: str, point: Point) -> float:
        return max(s.speed for s in samples if (s.arm, s.point) == (arm, point.name))

    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    bandwidth = weights * best("a", POINTS[0])
    adapter = synthetic.dynmole(**adapter_options(model), seed=0)
    more = (MANY - 1) * synthetic.touched_bytes(adapter, experts / EXPERTS)
    step = POINTS[2].batch / best("d", POINTS[2])
    return step / (step + more / bandwidth)


def host() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "commit": commit.strip(),
    }


def report(samples: list[Sample], arms: str, stopped: Sequence[str] = ()) -> str:
    """A row per point: best speed of each arm, and the median ratio with its spread."""
    pairs = [(arm, "a") for arm in "bdecfg" if {arm, "a"} <= set(arms)]
    pairs += [(arm, over) for arm, over in (("f", "d"), ("d", "c")) if {arm, over} <= set(arms)]
    lines = [f"{arm}: {name}" for arm, name in ARMS.items() if arm in arms]
    for point in POINTS:
        best: dict[str, float] = {}
        for sample in samples:
            if sample.point == point.name:
                best[sample.arm] = max(sample.speed, best.get(sample.arm, 0.0))
        if not best:
            continue
        lines.append(f"\n{point.name}")
        lines.append("  tokens/s " + "  ".join(f"{arm} {best[arm]:.1f}" for arm in best))
        for arm, over in pairs:
            if arm not in best or over not in best:
                continue
            values = ratios(samples, arm, over, point.name)
            spread = f"{min(values):.3f} to {max(values):.3f}, {len(values)} repetitions"
            best_ratio = best[arm] / best[over]
            lines.append(
                f"  {arm}/{over} median {statistics.median(values):.3f} "
                f"best/best {best_ratio:.3f} ({spread})"
            )
    lines += ["", *stopped] if stopped else []
    return "\n".join(lines)


def write(directory: Path, samples: list[Sample], facts: dict[str, Any], text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "engine.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "point", "repetition", "tokens_per_second"])
        writer.writerows([s.arm, s.point, s.repetition, f"{s.speed:.2f}"] for s in samples)
    (directory / "engine.json").write_text(json.dumps(facts, indent=1))
    (directory / "engine.txt").write_text(text + "\n")


def main() -> None:
    from molehill.benchmarks import synthetic

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--points", default="", help="only workloads with one of these words, a,b")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds per arm and workload")
    parser.add_argument("--dtype", default="auto", help="of every engine")
    parser.add_argument("--eager", action="store_true", help="compile no engine")
    args = parser.parse_args()
    arms = args.arms.replace(",", "")
    points = [p for p in POINTS if any(word in p.name for word in args.points.split(","))]
    options = {"dtype": args.dtype, "enforce_eager": args.eager}
    facts: dict[str, Any] = {"host": host(), "engines": options, "limits": limits(args.model)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = adapter_options(args.model)["base"]
        lora = synthetic.save_lora(base, EXPERTS * RANK, folder / "lora")
        with running_engines(args.model, arms, lora, options) as engines:
            progress("making and loading adapters")
            requests = make_requests(engines, arms, args.model, folder, lora)
            samples, stopped = run(engines, requests, arms, points, args.repetitions, args.budget)
            if "molehill" in engines:
                facts["routing"] = routing(engines, requests)
    if {"a", "d", "f"} <= set(arms):
        chosen = facts["routing"]["d"]["experts"]
        facts["limits"]["f/d, batch 32"] = many_limit(args.model, samples, chosen)
    text = "\n".join([report(samples, arms, stopped), "", json.dumps(facts, indent=1)])
    print(text)
    write(args.output, samples, facts, text)


if __name__ == "__main__":
    main()
