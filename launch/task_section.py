"""The page's section on lm-eval tasks: what every model reaches, and how much of the parent's that is. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.finished_run import PARENT, FinishedRun


def task_table(run: FinishedRun) -> dict[str, Any] | None:
    """The last evaluation's tasks, None where none ran.

    ``models`` are names. ``rows`` are by task: its metric, its number of examples, and by model what ``evaluate.json``
    says. ``recovered`` is by model the mean over the ``num_told`` tasks of which a share can be told, None for the
    parent. ``most_truncated`` is the largest number of cut questions of a task.
    """
    evaluated = (run.document("evaluate", "evaluate.json") or {"models": {}})["models"]
    done: dict[str, Mapping[str, Any]] = {name: row for name, row in evaluated.items() if row.get("tasks")}
    if not done:
        return None
    rows = {
        task: {
            "metric": result["metric"],
            "n": result["n"],
            "num_truncated": result["num_truncated"],
            "models": {name: done[name]["tasks"][task] for name in done},
        }
        for task, result in done[PARENT]["tasks"].items()
    }
    recovered = {name: None if name == PARENT else row["tasks_recovery_frac"] for name, row in done.items()}
    num_told = sum(result["recovery_frac"] is not None for result in done[PARENT]["tasks"].values())
    return {
        "models": [*done],
        "rows": rows,
        "recovered": recovered,
        "num_told": num_told,
        "most_truncated": max(row["num_truncated"] for row in rows.values()),
    }
