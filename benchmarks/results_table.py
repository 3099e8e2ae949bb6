"""What a run found, as a table, JSON and a plot."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SPEED = "tokens_per_s"


@dataclass(frozen=True)
class Sample:
    """One figure of one contestant and workload, by their names, in one repetition."""

    contestant: str
    workload: str
    figure: str
    repetition: int
    value: float


@dataclass(frozen=True)
class Cell:
    """A figure's best repetition. ratio, least, most: over the base's of the same repetition,
    median and range. limit: the ratio that bytes and multiply-adds allow. share: of the speed that
    they allow."""

    contestant: str
    workload: str
    figure: str
    best: float
    ratio: float | None
    least: float | None
    most: float | None
    limit: float | None = None
    share: float | None = None


def cells(
    samples: Sequence[Sample], base: str, limits: dict[tuple[str, str], tuple[float, float]]
) -> list[Cell]:
    """In the order of the samples. Ratios are speeds over the base's, for times the base's over
    theirs: above 1 is faster.

    limits: by contestant and workload, tokens/s at most and the share of the base's own limit.
    """
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for sample in samples:
        key = sample.contestant, sample.workload, sample.figure
        values.setdefault(key, {})[sample.repetition] = sample.value
    result = []
    for (contestant, workload, figure), by_repetition in values.items():
        is_speed = figure == SPEED
        best = max(by_repetition.values()) if is_speed else min(by_repetition.values())
        against = values.get((base, workload, figure), {})
        ratios = [
            by_repetition[i] / against[i] if is_speed else against[i] / by_repetition[i]
            for i in by_repetition
            if i in against
        ]
        most, ratio = limits.get((contestant, workload), (None, None)) if is_speed else (None, None)
        result.append(
            Cell(
                contestant,
                workload,
                figure,
                best,
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
                ratio,
                best / most if most else None,
            )
        )
    return result


def print_tables(cells: Sequence[Cell], notes: Sequence[str], console: Console) -> None:
    """A row for each contestant: speeds with their ratios and limits, then latencies."""
    speeds = [cell for cell in cells if cell.figure == SPEED]
    others = [cell for cell in cells if cell.figure != SPEED]
    if speeds:
        title = "tokens/s; speed over the plain base's (and what bytes and multiply-adds allow)"
        console.print(_table(speeds, [(cell.workload, "") for cell in speeds], title))
    for workload in dict.fromkeys(cell.workload for cell in others):
        row = [cell for cell in others if cell.workload == workload]
        title = f"{workload}: milliseconds; how much faster than the plain base"
        console.print(_table(row, [("", cell.figure) for cell in row], title))
    for note in notes:
        console.print(escape(note))


def _table(cells: Sequence[Cell], columns: Sequence[tuple[str, str]], title: str) -> Table:
    columns = list(dict.fromkeys(columns))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for workload, figure in columns:
        table.add_column("\n".join(filter(None, (workload, _label(figure)))), justify="right")
    by_place = {
        (c.contestant, *((c.workload, "") if c.figure == SPEED else ("", c.figure))): c
        for c in cells
    }
    for contestant in dict.fromkeys(cell.contestant for cell in cells):
        row = [by_place.get((contestant, *column)) for column in columns]
        table.add_row(escape(contestant), *(_text(cell) if cell else "-" for cell in row))
    return table


def _label(figure: str) -> str:
    name, _, percent = figure.removesuffix("_ms").partition("_")
    return f"{name.upper()} {percent}".strip()


def _text(cell: Cell) -> str:
    lines = [f"{cell.best:,.1f}" if cell.best < 1000 else f"{cell.best:,.0f}"]
    if cell.ratio is not None:
        limit = "" if cell.limit is None else f" ({cell.limit:.2f})"
        lines.append(f"{cell.ratio:.2f}{limit}")
    return "\n".join(lines)


def write_json(
    path: Path, samples: Sequence[Sample], cells: Sequence[Cell], facts: dict[str, Any]
) -> None:
    table = [asdict(cell) for cell in cells]
    path.write_text(
        json.dumps({**facts, "table": table, "samples": [asdict(s) for s in samples]}, indent=1)
    )


def plot(path: Path, cells: Sequence[Cell], title: str) -> bool:
    """A group of bars for each workload: speed over the base's, its range over the repetitions, and
    the limit as a line. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [cell for cell in cells if cell.figure == SPEED and cell.ratio is not None]
    workloads = list(dict.fromkeys(cell.workload for cell in bars))
    names = list(dict.fromkeys(cell.contestant for cell in bars))
    width = 0.8 / max(1, len(names))
    figure, axes = pyplot.subplots(figsize=(3 + 1.6 * len(workloads), 5))
    for i, name in enumerate(names):
        series = [cell for cell in bars if cell.contestant == name]
        x = [workloads.index(cell.workload) + (i - len(names) / 2 + 0.5) * width for cell in series]
        ratios = [cell.ratio or 0.0 for cell in series]
        below = [
            cell.ratio - cell.least for cell in series if cell.ratio and cell.least is not None
        ]
        above = [cell.most - cell.ratio for cell in series if cell.ratio and cell.most is not None]
        axes.bar(x, ratios, width, yerr=(below, above), capsize=2, label=name)
        for place, cell in zip(x, series, strict=True):
            if cell.limit is not None:
                axes.hlines(cell.limit, place - width / 2, place + width / 2, "black")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("speed over the plain base")
    axes.set_title(f"{title}\nblack line: what bytes and multiply-adds allow", size=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return True
