"""The command ``plan``: its arguments, its table and its JSON. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.config import require
from launch.plan import GIB, PipelinePlan, StepPlan, plan_pipeline

WIDTH = 140
"""Characters of the table, where the terminal does not say or has fewer."""


def run(arguments: Sequence[str]) -> int:
    """``python -m launch plan <pipeline> [overrides] [--json]``. Returns 0 where everything fits, else 2.

    Raises:
        ValueError: the arguments or a configuration are wrong, or a shape is not known.
    """
    names = [text for text in arguments if not text.startswith("-") and "=" not in text]
    options = [text for text in arguments if text.startswith("-")]
    require(
        len(names) == 1 and set(options) <= {"--json"},
        f"plan takes one pipeline, overrides and --json, got {' '.join(arguments) or 'nothing'}; try: python -m launch "
        "plan smollm2 cluster=slurm",
    )
    plan = plan_pipeline(names[0], [text for text in arguments if "=" in text])
    if options:
        print(json.dumps({**asdict(plan), "problems": plan.problems}, indent=2))
    else:
        print_plan(plan)
    return 2 if plan.problems else 0


def print_plan(plan: PipelinePlan) -> None:
    """The table, what was assumed, and what does not fit."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    table = Table(box=None, pad_edge=False)
    for column in ("step", "stage", "nodes", "GPUs", "GiB", "of", "host GiB", "step s", "hours", "GPU h", "disk GiB"):
        table.add_column(column, justify="left" if column in ("step", "stage") else "right")
    for row in plan.steps:
        table.add_row(*_cells(row), style="red" if row.problem else None)
    console.print(table)
    for row in plan.steps:
        for note in dict.fromkeys(row.notes):
            console.print(f"[dim]{row.step}: {escape(note)}[/]")
    hours = sum(row.gpu_hours or 0 for row in plan.steps)
    disk = sum(_disk_gib(row) for row in _first_rows(plan))
    console.print(
        f"{hours:,.0f} GPU hours on {plan.hardware} at {plan.utilization:.0%} of its sustained rate, {disk:,.0f} GiB "
        "of disk; steps without hours are measurements or work of a CPU, and are not counted"
    )
    for problem in plan.problems:
        console.print(f"[bold red]does not fit:[/] {escape(problem)}")


def _first_rows(plan: PipelinePlan) -> list[StepPlan]:
    """One row per step: phases share an artifact."""
    return list({row.step.partition(" ")[0]: row for row in plan.steps}.values())


def _disk_gib(row: StepPlan) -> float:
    return row.artifact_gib + row.resume_gib


def _cells(row: StepPlan) -> list[str]:
    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    host = sum(row.host_bytes.values()) / GIB
    return [
        row.step,
        row.stage,
        str(row.nodes) if row.gpus else "",
        str(row.gpus) if row.gpus else "",
        number(row.needed_gib),
        number(row.limit_gib) if row.needed_gib is not None else "",
        number(host) if host else "",
        number(row.step_s, 2),
        number(row.hours, 2),
        number(row.gpu_hours),
        number(_disk_gib(row)),
    ]
