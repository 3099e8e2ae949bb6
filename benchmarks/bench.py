"""`molehill bench`: how fast this machine serves a model plain, and with adapters.

Contestants take turns on the same prompts, over several repetitions, on engines that live side by
side; ratios are taken within a repetition. Beside each speed stands what bytes and multiply-adds
allow on this machine. Without --adapter, a DynMoLE and a MixLoRA of random weights are measured.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from molehill.api.cli.arguments import positive
from molehill.benchmarks import engines, limits, results_table, shapes, synthetic
from molehill.benchmarks.contestants import (
    PLAIN_BASE,
    Contestant,
    Mixtures,
    dtype_of,
    line_up,
)
from molehill.benchmarks.engines import progress
from molehill.benchmarks.host import host
from molehill.benchmarks.turns import Measurements
from molehill.benchmarks.workloads import PROMPT, Workload
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.hf.shapes import base_model

USER_ERROR = 2
# Of what the plain base can decode at the largest batch, for requests that arrive.
LOAD = 0.5
RATE_PROMPT, RATE_TOKENS = 64, 32


def main(arguments: Sequence[str]) -> int:
    """Runs the command; 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="molehill bench",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.model is None) == (args.shape is None):
        found = "neither" if args.model is None else "both"
        parser.error(f"found {found} of MODEL and --shape, expected one of them")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Bench(args, Path(folder)).run()
    except (AdapterError, OSError, ValueError) as error:
        print(f"molehill bench: {error}", file=sys.stderr)
        return USER_ERROR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or cached name")
    parser.add_argument("--adapter", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument(
        "--shape", choices=shapes.SHAPES, help="a Llama of this size with dummy weights, no MODEL"
    )
    parser.add_argument("--load-format", default="auto", help="dummy: MODEL's config alone is read")
    parser.add_argument(
        "--vs-vllm", action="store_true", help="also static LoRA of the same rank, on both engines"
    )
    parser.add_argument(
        "--many", type=positive, default=32, help="adapters in one batch; 1 for none (%(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=batch_sizes,
        default=[1, 8, 32],
        metavar="N,N",
        help="sequences that decode at a time (%(default)s)",
    )
    parser.add_argument(
        "--tokens", type=several, default=64, help="that each decodes (%(default)s)"
    )
    parser.add_argument(
        "--prefill", type=prompts, default=(4, 512), metavar="PxT", help="prompts x tokens (4x512)"
    )
    parser.add_argument(
        "--rate", type=float, help="requests/s that arrive; half of what the base can, 0 for none"
    )
    parser.add_argument("--requests", type=positive, default=64, help="that arrive (%(default)s)")
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds of one contestant's turn (%(default)s)"
    )
    parser.add_argument(
        "--experts", type=positive, default=8, help="of random adapters (%(default)s)"
    )
    parser.add_argument("--rank", type=positive, default=8, help="of their experts (%(default)s)")
    parser.add_argument(
        "--sharpness",
        type=float,
        default=1.0,
        help="standard deviation of their routers' logits (%(default)s)",
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="where the engines do not fit side by side"
    )
    parser.add_argument("--eager", action="store_true", help="neither compiled nor captured")
    parser.add_argument("--max-model-len", type=positive, default=2048)
    parser.add_argument(
        "--output", type=Path, default=Path("molehill-bench"), help="a folder (%(default)s)"
    )


def batch_sizes(text: str) -> list[int]:
    """`1,8,32`; raises argparse.ArgumentTypeError."""
    return [positive(part) for part in text.split(",")]


def prompts(text: str) -> tuple[int, int]:
    """`4x512`, how many of how many tokens; raises argparse.ArgumentTypeError."""
    number, _, length = text.partition("x")
    return positive(number), positive(length)


def several(text: str) -> int:
    """At least two, between which time is measured; raises argparse.ArgumentTypeError."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected at least 2")
    return number


class Bench:
    """One run. folder: for what it makes and nobody keeps."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoConfig

        self.args, self._folder = args, folder
        self._model = str(shapes.write(args.shape, folder)) if args.shape else args.model
        self._has_dummy_weights = args.shape is not None or args.load_format == "dummy"
        self._base = base_model(self._model)
        self._config = AutoConfig.from_pretrained(self._model).get_text_config()
        self._options: dict[str, Any] = {
            "max_model_len": args.max_model_len,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "max_num_seqs": max(64, *args.batches),
            "dtype": args.dtype,
            "enforce_eager": args.eager,
            "skip_tokenizer_init": True,
            "load_format": "dummy" if self._has_dummy_weights else args.load_format,
        }

    def run(self) -> int:
        args = self.args
        contestants = line_up(args.adapter, self._mixtures, args.many, args.vs_vllm, self._folder)
        turns = Measurements(args.repetitions, args.budget)
        groups = [contestants]
        if args.one_at_a_time:
            names = dict.fromkeys(contestant.engine for contestant in contestants)
            groups = [
                [contestant for contestant in contestants if contestant.engine == name]
                for name in names
            ]
        dtype, routed = "", dict[str, Any]()
        for group in groups:
            with engines.running(self._model, group, self._options, *self._sizes()) as running:
                config = running[group[0].engine].llm_engine.model_config
                dtype = str(config.dtype).removeprefix("torch.")
                progress("loading adapters")
                requests = engines.load(running, group)
                turns.take(running, requests, group, self._workloads())
                if (rate := self._rate(turns)) > 0:
                    arriving = [Workload(args.requests, RATE_PROMPT, RATE_TOKENS, rate)]
                    turns.take(running, requests, group, arriving)
                routed |= engines.chosen(running, requests)
        return self._report(contestants, turns, dtype, routed)

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the base, and of a number: what the engines choose is known when they are up."""
        itemsize = 4 if self.args.dtype in ("float32", "float") else 2
        one = limits.base_step(self._base, self._config, itemsize, Workload(1, 1, 2))
        return int(one.moved), itemsize

    @cache  # noqa: B019  One Bench a process.
    def _mixtures(self) -> Mixtures:
        args, linears = self.args, dict(self._base.linears)
        if self._has_dummy_weights:
            sizes = shapes.dummy_input_sizes(linears)
        else:
            progress("measuring what the linears read")
            sizes = synthetic.input_sizes(self._model)
        return Mixtures(self._base, args.experts, args.rank, args.sharpness, sizes)

    def _workloads(self) -> list[Workload]:
        decode = [Workload(batch, PROMPT, self.args.tokens) for batch in self.args.batches]
        batch, length = self.args.prefill
        return [*decode, Workload(batch, length, 1)]

    def _rate(self, turns: Measurements) -> float:
        """Requests per second: as asked for, or by what the plain base was seen to do."""
        if self.args.rate is not None:
            return float(self.args.rate)
        largest = max(self._workloads()[:-1], key=lambda workload: workload.batch).name
        speeds = [
            sample.value
            for sample in turns.samples
            if sample.contestant == PLAIN_BASE and sample.workload == largest
        ]
        return LOAD * max(speeds, default=0.0) / RATE_TOKENS

    def _report(
        self,
        contestants: Sequence[Contestant],
        turns: Measurements,
        dtype: str,
        routed: dict[str, Any],
    ) -> int:
        allowed = self._limits(contestants, dtype, routed)
        cells = results_table.cells(turns.samples, PLAIN_BASE, allowed)
        notes = [
            f"{name}: {means['experts']:.1f} experts a token and router, {means['soft']:.0%} soft"
            for name, means in routed.items()
        ]
        if self.args.one_at_a_time:
            notes.append("one engine at a time: ratios are of different minutes")
        facts = {
            "host": host(),
            "model": self.args.shape or self.args.model,
            "dtype": dtype,
            "options": {key: str(value) for key, value in vars(self.args).items()},
            "routing": routed,
            "stopped": list(turns.stopped.values()),
        }
        results_table.print_tables(cells, [*notes, *turns.stopped.values()], Console())
        self.args.output.mkdir(parents=True, exist_ok=True)
        results_table.write_json(self.args.output / "bench.json", turns.samples, cells, facts)
        device = facts["host"].get("gpu", facts["host"]["cpu"])
        title = f"{facts['model']}, {dtype}; {device}"
        if not results_table.plot(self.args.output / "bench.png", cells, title):
            progress("no plot: matplotlib is not installed")
        progress(f"written to {self.args.output}")
        return 0

    def _limits(
        self, contestants: Sequence[Contestant], dtype: str, routed: dict[str, Any]
    ) -> dict[tuple[str, str], tuple[float, float]]:
        """By contestant and workload: tokens/s at most, and the share of the base's own."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        machine, itemsize = limits.Machine.seen(device, dtype_of(dtype)), dtype_of(dtype).itemsize
        result = {}
        for contestant, workload in product(contestants, self._workloads()):
            base = limits.base_step(self._base, self._config, itemsize, workload)
            adapters = []
            if contestant.work is not None:
                chosen = routed.get(contestant.name, {}).get("experts", contestant.work.experts)
                adapters = [(contestant.work, chosen)] * len(contestant.paths)
            key = contestant.name, workload.name
            result[key] = limits.speed_limits(machine, workload, base, adapters, itemsize)
        return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
