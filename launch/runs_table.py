"""The table over several runs, in a terminal and as CSV. Torch-free."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.quantities import decimals, duration, scaled
from launch.runs_compared import ComparedRun, Comparison, Group, gpu_hours
from launch.summary import COLUMNS

WIDTH = 200
"""Characters that the table may have, whatever the terminal says: it is as wide as its cells."""
MAX_CELL = 40
"""Characters of a setting or a name."""
FRONTS = {"kld": "KLD", "lm_loss_gap_closed_frac": "recovery"}
"""Metric -> its name in the column of fronts."""
FURTHER: Mapping[str, Callable[[ComparedRun], str]] = {
    "tokens": lambda run: scaled(run.model["tokens"]),
    "time": lambda run: duration(run.seconds),
    "GPU h": lambda run: decimals(run.gpu_hours, 2),
}
"""Header -> cell, behind the columns of a run's own summary."""


def print_table(comparison: Comparison, console: Console | None = None) -> None:
    """Print one table per group of runs that were measured alike, and the runs that are missing.

    Args:
        comparison: what to print.
        console: where; None: standard output.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    console.print(f"[bold]{escape(comparison.title)}[/]")
    if comparison.differences:
        console.print(
            f"[yellow]not measured alike ({', '.join(comparison.differences)}): compare within a table, not between "
            "them[/]"
        )
    for group in comparison.groups:
        console.print(_table(comparison, group))
        if group.situation.serving:
            console.print(f"latency: {group.situation.serving}; {escape(group.situation.hardware or '')}", style="dim")
    console.print(
        "front: no other run, nor the parent, is at once as fast and better at this; time: of all steps, shared ones "
        f"counted in every run; all runs together took {total_cost(comparison)}",
        style="dim",
    )
    for name, reason in comparison.unfinished.items():
        console.print(f"[yellow]missing:[/] {escape(name)}: {escape(reason)}")


def _table(comparison: Comparison, group: Group) -> Table:
    has_gpu = any(run.gpu_hours is not None for run in group.runs)
    further = {header: cell for header, cell in FURTHER.items() if has_gpu or header != "GPU h"}
    table = Table(header_style="dim", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", justify="right", no_wrap=True)
    for key in comparison.columns or ("name",):
        table.add_column(escape(key.rpartition(".")[2]), no_wrap=True)
    for header in ("model", *COLUMNS, *further, "front"):
        table.add_column(header, justify="left" if header in ("model", "front") else "right", no_wrap=True)
    blank = [""] * max(len(comparison.columns), 1)
    parent = [cell(group.runs[0].parent) for cell in COLUMNS.values()]
    table.add_row("", *blank, "parent", *parent, *([""] * len(further)), "", style="dim")
    for run in group.runs:
        fronts = [name for metric, name in FRONTS.items() if run.number in group.fronts[metric]]
        settings = [escape(_short(value)) for value in run.settings.values()] or [escape(_short(run.directory.name))]
        cells = [cell(run.model) for cell in COLUMNS.values()]
        own = [cell(run) for cell in further.values()]
        style = "bold" if fronts else None
        table.add_row(str(run.number), *settings, run.model_name, *cells, *own, ", ".join(fronts), style=style)
    return table


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}\N{HORIZONTAL ELLIPSIS}"


def total_cost(comparison: Comparison) -> str:
    """What all runs took together, each step counted once, in words."""
    artifacts = comparison.artifacts
    hours = gpu_hours(artifacts)
    words = duration(sum(artifact.manifest.seconds for artifact in artifacts))
    return words if hours is None else f"{words} and {hours:,.2f} GPU hours"


def write_csv(comparison: Comparison, file: Path) -> None:
    """One line per run; a number that does not exist is an empty cell."""
    rows: list[dict[str, Any]] = list(comparison.rows())
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
