"""Which metric stands for a task, and what lm-eval's results say of it. Knows no lm-eval, and is torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.config import require

NO_FILTER = "none"
"""lm-eval's name where answers are taken as they are."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric that stands for a task."""

    name: str
    filter: str
    """Filter of answers; ``NO_FILTER`` where there is none."""

    @property
    def label(self) -> str:
        """``acc``, ``exact_match,strict-match``."""
        return self.name if self.filter == NO_FILTER else f"{self.name},{self.filter}"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a model does a task."""

    metric: str
    """Label of the metric that stands for the task."""
    value: float
    """Higher is better."""
    stderr: float | None
    """lm-eval's standard error; None where it has none."""
    n: int
    """Examples; of a group, those of all its tasks."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """By label, every metric that lm-eval gives: ``value`` and ``stderr``."""


def choose_metric(node: str, task: str, more_is_better: Mapping[str, bool], wanted: str | None) -> str:
    """The metric that stands for ``task``: ``wanted``, or the first where more is better.

    Args:
        node: node of the configuration, for errors.
        task: task or group of the configuration.
        more_is_better: by metric, in the order of the task's file.
        wanted: the configuration's.

    Raises:
        ValueError: the task has no such metric, or less is better, so that no share of the parent's can be told.
    """
    names = ", ".join(more_is_better)
    require(
        wanted is None or wanted in more_is_better,
        f"{node}.task_metrics: {task} has no metric {wanted}; it has {names}",
    )
    candidates = [wanted] if wanted is not None else [*more_is_better]
    found = next((name for name in candidates if more_is_better[name]), None)
    if found is None:
        raise ValueError(
            f"{node}.tasks: {task} is measured by {', '.join(candidates)}, where less is better, and has no share of "
            "the parent's; give tasks or task_metrics where more is better"
        )
    return found


def read_result(node: str, task: str, metric: Metric, found: Mapping[str, Any]) -> TaskResult:
    """What lm-eval's results of a task or group say.

    Raises:
        ValueError: they have no number for ``metric``.
    """
    value = _number(found.get(f"{metric.name},{metric.filter}"))
    if value is None:
        raise ValueError(
            f"{node}.tasks: lm-eval gives {found.get(f'{metric.name},{metric.filter}')} as {metric.label} of {task}, "
            f"which is no number; leave it out, or name another metric as {node}.task_metrics"
        )
    metrics = {}
    for key, given in found.items():
        name, comma, filter_name = key.partition(",")
        number = _number(given)
        if comma and number is not None and not name.endswith("_stderr"):
            stderr = _number(found.get(f"{name}_stderr,{filter_name}"))
            metrics[Metric(name=name, filter=filter_name).label] = {"value": number, "stderr": stderr}
    return TaskResult(
        metric=metric.label,
        value=value,
        stderr=metrics[metric.label]["stderr"],
        n=int(found["sample_len"]),
        metrics=metrics,
    )


def _number(given: Any) -> float | None:
    """lm-eval writes ``N/A`` where it has none."""
    return float(given) if isinstance(given, int | float) and math.isfinite(given) else None
