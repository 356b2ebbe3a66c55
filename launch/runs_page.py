"""Several runs as one self-contained HTML page. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launch.canvas import ROLES, stand_alone
from launch.figures import Picture, picture
from launch.finished_run import read_architecture
from launch.page_frame import page_template
from launch.recovery_section import HELD_OUT, held_out_curves
from launch.runs_compared import PARENT_VALUES, ComparedRun, Comparison, Group
from launch.runs_figures import Panel, RunPoint, pareto, recovery_of_runs, run_role
from launch.runs_table import total_cost
from launch.strip import ArchitectureStrip, architecture_strip

TEMPLATE = "runs.html.j2"
LABELS = {
    "kld": "KL divergence from the parent, nats per token",
    "lm_loss_gap_closed_frac": "recovery: share of the LM-loss gap closed",
}
"""Metric -> label of its panel."""


def render_runs(comparison: Comparison, page: Path) -> str:
    """The page, which will lie at ``page``: links to the runs' own pages are relative to it."""
    groups = [
        {"group": group, "runs": group.runs, "parent": group.runs[0].parent, "picture": pareto_picture(group)}
        for group in comparison.groups
    ]
    by_parent = _by_parent(comparison)
    return page_template(TEMPLATE).render(
        comparison=comparison,
        groups=groups,
        settings={key: row for key, row in comparison.settings.items() if key not in comparison.columns},
        total_cost=total_cost(comparison),
        recovery=[item for runs in by_parent for item in _recovery(runs, is_only=len(by_parent) == 1)],
        strips=[(run, _strip(run)) for run in comparison.runs],
        links={run.number: _link(run, page) for run in comparison.runs},
        role_of=run_role,
        roles=ROLES,
    )


def pareto_picture(group: Group) -> Picture | None:
    """Decode latency against KL divergence and against recovery; None where fewer than two runs have both."""
    points = [_point(group, run) for run in group.runs if run.model["decode_latency_vs_parent"] is not None]
    panels = [
        Panel(
            metric=metric,
            label=label,
            parent=PARENT_VALUES[metric],
            has_parent_on_front=0 in group.fronts[metric],
            is_percent=metric.endswith("_frac"),
        )
        for metric, label in LABELS.items()
        if any(point.values[metric] is not None for point in points)
    ]
    if not panels or len(points) < 2:
        return None
    number = group.runs[0].number
    return picture(
        "Quality against latency",
        "Filled: no other run, nor the parent, is at once as fast and as good. Latency of every run is measured in "
        "turns with its parent, so that a machine that was slower on one day than on another does not count. Recovery "
        "is counted from each run's own model after surgery.",
        pareto(points, panels, f"Pareto front of runs from {number}"),
        wide=True,
    )


def pareto_file(group: Group) -> str | None:
    """The same picture as a file of its own."""
    drawn = pareto_picture(group)
    return stand_alone(str(drawn.svg)) if drawn else None


def _point(group: Group, run: ComparedRun) -> RunPoint:
    return RunPoint(
        number=run.number,
        latency_frac=run.model["decode_latency_vs_parent"],
        values={metric: run.model[metric] for metric in LABELS},
        fronts=frozenset(metric for metric, numbers in group.fronts.items() if run.number in numbers),
    )


def _by_parent(comparison: Comparison) -> list[list[ComparedRun]]:
    """Runs whose curves may share a picture: they learn from the same teacher."""
    by_parent: dict[str, list[ComparedRun]] = {}
    for run in comparison.runs:
        by_parent.setdefault(run.situation.parent, []).append(run)
    return list(by_parent.values())


def _recovery(runs: list[ComparedRun], *, is_only: bool) -> Iterator[Picture]:
    curves = {run.number: held_out_curves(run.run) for run in runs}
    labels = {run.number: run.label for run in runs}
    for metric, words in HELD_OUT.items():
        own = {number: found[metric] for number, found in curves.items() if metric in found}
        if own:
            name = f"{words.title} of runs from {runs[0].number}"
            yield picture(
                words.title if is_only else f"{words.title}: runs {', '.join(map(str, own))}",
                "On held-out sequences, against the tokens of distillation and context extension.",
                recovery_of_runs(own, labels, words.label, name),
            )


def _strip(run: ComparedRun) -> ArchitectureStrip:
    own = run.run
    return architecture_strip(*(read_architecture(model) for model in (own.parent, own.unfused, own.final)))


def _link(run: ComparedRun, page: Path) -> str:
    return Path(os.path.relpath(run.directory.path / "report" / "index.html", page.parent)).as_posix()
