"""The kernel benchmark's results: rows, the CSV, the plot."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from molehill.benchmarks.floor import LayerWork, ObservedMachine
from molehill.benchmarks.host import host
from molehill.benchmarks.race import Timing
from molehill.benchmarks.workload import Point

ARMS = {"vllm": "vLLM's LoRA, same total rank", "torch": "torch backend", "cpp": "C++ backend"}
COLORS = {"vllm": "tab:red", "torch": "tab:orange", "cpp": "tab:blue", "floor": "0.6"}


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times in microseconds per op and layer.

    An empty time: one call took over a second, or vLLM is not installed. chosen: experts per token
    and router. floor_percent: floor_us in percent of cpp_us; bound: what makes the floor. moved,
    done: bytes and multiply-adds of one op. bandwidth (GB/s), rate (thousand million multiply-adds
    per second): the machine's, as measured in this run.
    """

    sweep: str
    op: str
    tokens: int
    experts: int
    rank: int
    policy: str
    adapters: int
    chosen: float
    cpp_us: float | None
    cpp_median_us: float | None
    torch_us: float | None
    torch_median_us: float | None
    vllm_us: float | None
    vllm_median_us: float | None
    floor_us: float
    floor_percent: float | None
    bound: str
    moved: int
    done: int
    bandwidth: float
    rate: float
    threads: int


@dataclass(frozen=True)
class Result:
    """One point: seconds per op and layer by arm, None where there is none, and the work done."""

    sweep: str
    point: Point
    timings: Mapping[str, Timing | None]
    needed: LayerWork


def row(result: Result, machine: ObservedMachine) -> Row:
    """Sets a result against the machine's limits; rounds."""
    point, timings, needed = result.point, result.timings, result.needed
    floor, bound = needed.floor(machine)
    times: dict[str, float | None] = {}
    for arm in ARMS:
        timing = timings.get(arm)
        times[f"{arm}_us"] = round(timing.best * 1e6, 2) if timing else None
        times[f"{arm}_median_us"] = round(timing.median * 1e6, 2) if timing else None
    cpp = timings["cpp"]
    return Row(
        sweep=result.sweep,
        op=point.op,
        tokens=point.tokens,
        experts=point.experts,
        rank=point.rank,
        policy=type(point.policy).__name__,
        adapters=point.adapters,
        chosen=round(needed.chosen, 3),
        floor_us=round(floor * 1e6, 2),
        floor_percent=round(100 * floor / cpp.best, 1) if cpp else None,
        bound=bound,
        moved=round(needed.moved),
        done=round(needed.done),
        bandwidth=round(machine.bandwidth(needed.resident) / 1e9, 2),
        rate=round(machine.rate / 1e9, 2),
        threads=torch.get_num_threads(),
        **times,
    )


def line(row: Row) -> str:
    """A row for the eye."""
    what = f"{row.sweep} {row.op} {row.policy} T {row.tokens} E {row.experts} r {row.rank}"
    times = "  ".join(f"{arm} {getattr(row, f'{arm}_us')}" for arm in (*ARMS, "floor"))
    return f"{what} x {row.adapters}: {times} us, {row.floor_percent} % ({row.bound})"


def write_csv(rows: Sequence[Row], path: Path | None) -> None:
    """To a file, or to the standard output."""
    if path is None:
        _write(rows, sys.stdout)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        _write(rows, file)


def _write(rows: Sequence[Row], file: Any) -> None:
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel per sweep and op: best turns, shaded up to the median. Needs matplotlib."""
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.sweep, row.op), []).append(row)
    columns = min(5, len(panels))
    deep = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        deep, columns, figsize=(3.6 * columns + 1, 3.3 * deep), squeeze=False
    )
    for axes, (names, panel_rows) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, *names, panel_rows)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("microseconds per layer")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_title(rows), size=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"SmolLM2-135M's layers, bfloat16; {host()['cpu']}, {first.threads} threads, "
        f"{first.rate:.0f} G multiply-adds/s\nline: best turn, shade: up to the median; "
        "percentage: floor over C++ backend"
    )


def _panel(axes: Any, sweep: str, op: str, rows: Sequence[Row]) -> None:
    variable = "tokens" if sweep == "ffn" else sweep
    is_named = variable == "policy"
    x = [_label(row) if is_named else getattr(row, variable) for row in rows]
    style = {"linestyle": "", "markersize": 8} if is_named else {"markersize": 3}
    for arm, label in ARMS.items():
        best = [getattr(row, f"{arm}_us") or float("nan") for row in rows]
        median = [getattr(row, f"{arm}_median_us") or float("nan") for row in rows]
        axes.plot(x, best, marker="o", color=COLORS[arm], label=label, **style)
        if not is_named:
            axes.fill_between(x, best, median, color=COLORS[arm], alpha=0.25, linewidth=0)
    floor = [row.floor_us for row in rows]
    axes.plot(x, floor, marker="_", color=COLORS["floor"], label="floor", **style)
    for place, row in zip(x, rows, strict=True):
        if row.floor_percent is not None:
            text = f"{row.floor_percent:.0f}%"
            axes.annotate(
                text,
                (place, row.floor_us),
                (0, -9),
                textcoords="offset points",
                ha="center",
                size=6,
            )
    axes.set_yscale("log")
    axes.margins(y=0.12)
    if not is_named:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
    axes.tick_params(axis="x", labelsize=6)
    axes.set_title(_panel_title(sweep, op, rows[-1]), size=9)
    axes.set_xlabel("" if is_named else variable)


def _label(row: Row) -> str:
    return "plain LoRA" if row.policy == "Constant" else row.policy


def _panel_title(sweep: str, op: str, row: Row) -> str:
    method = "MixLoRA top-2" if op == "ffn" else "DynMoLE"
    if sweep in ("tokens", "ffn"):
        return f"{op}: {method}, {row.experts} experts of rank {row.rank}"
    return f"{op}, {row.tokens} tokens: over {sweep}"
