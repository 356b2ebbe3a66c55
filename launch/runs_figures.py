"""The figures over several runs, each an inline SVG. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.canvas import FONT_SIZE, NUM_SERIES, PARENT, ROLES, legend, new_figure, series_role, to_svg, token_ticks
from launch.recovery import RecoveryCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""Of lines whose colours have been used up."""
LABEL_OFFSETS = ((7, 5), (7, -14), (-7, 5), (-7, -14), (7, 16), (7, -26), (-7, 16), (-7, -26))
"""Where a number may stand beside its point, in pixels, the best first."""
CROWDED = 11
"""Pixels between the corners of two labels below which they are hard to read."""
MAX_LEGEND = 12
"""Runs that a legend names."""


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """One run in the pictures of quality against latency."""

    number: int
    latency_frac: float
    """Decode latency as a fraction of the parent's, measured beside it."""
    values: Mapping[str, float | None]
    """By name of a panel's metric."""
    fronts: frozenset[str]
    """Metrics on whose front it lies."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric against latency."""

    metric: str
    label: str
    parent: float
    """The parent's own value."""
    has_parent_on_front: bool
    is_percent: bool = False


def run_role(number: int) -> str:
    """Role of run ``number``, from 1."""
    return series_role(number - 1)


def pareto(points: Sequence[RunPoint], panels: Sequence[Panel], name: str) -> str:
    """Quality against latency, a panel per metric: runs on the front are filled and joined, the parent is a diamond."""
    figure, columns = new_figure(width=540 * len(panels), height=380, columns=len(panels))
    for axes, panel in zip(columns if len(panels) > 1 else [columns], panels, strict=True):
        _pareto_panel(axes, points, panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend(figure, handles, labels, loc="outside upper right", ncols=len(labels))
    return to_svg(figure, name)


def _pareto_panel(axes: Axes, points: Sequence[RunPoint], panel: Panel) -> None:
    known = [(point, value) for point in points if (value := point.values[panel.metric]) is not None]
    front = sorted((p.latency_frac, value) for p, value in known if panel.metric in p.fronts)
    joined = sorted([*front, (1.0, panel.parent)]) if panel.has_parent_on_front else front
    axes.plot(*zip(*joined, strict=True), color=ROLES["muted"], lw=1.3, zorder=2, label="Pareto front")
    axes.plot(1.0, panel.parent, "D", color=ROLES[PARENT], markersize=8, zorder=3, ls="none", label="parent")
    for point, value in known:
        colour = ROLES[run_role(point.number)]
        is_best = panel.metric in point.fronts
        face = colour if is_best else ROLES["panel"]
        axes.plot(point.latency_frac, value, "o", mec=colour, mfc=face, mew=1.8, markersize=8, zorder=4)
    for label, face in (("run on the front", ROLES["ink"]), ("another run", ROLES["panel"])):
        axes.plot([], [], "o", mec=ROLES["ink"], mfc=face, mew=1.6, markersize=7, label=label)
    axes.margins(x=0.12, y=0.14)
    _number_points(axes, [(point, value) for point, value in known])
    axes.set_xlabel("decode latency, fraction of the parent's")
    axes.set_ylabel(panel.label)
    if panel.is_percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _number_points(axes: Axes, points: Sequence[tuple[RunPoint, float]]) -> None:
    taken = [axes.transData.transform((point.latency_frac, value)) for point, value in points]
    for point, value in points:
        place = axes.transData.transform((point.latency_frac, value))
        free = (
            offset
            for offset in LABEL_OFFSETS
            if all(abs(place[0] + offset[0] - x) + abs(place[1] + offset[1] - y) >= CROWDED for x, y in taken)
        )
        offset = next(free, LABEL_OFFSETS[0])
        taken.append(place + offset)
        axes.annotate(
            str(point.number),
            (point.latency_frac, value),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right",
            color=ROLES["ink"],
            fontsize=FONT_SIZE,
            fontweight="bold",
        )


def recovery_of_runs(
    curves: Mapping[int, Sequence[RecoveryCurve]], labels: Mapping[int, str], label: str, name: str
) -> str:
    """One held-out metric against training tokens, a colour per run; all training steps of a run share it.

    Args:
        curves: run number -> curves of its training steps, in order.
        labels: run number -> name in the legend.
        label: of the metric.
        name: of the picture.
    """
    figure, axes = new_figure(width=520, height=340)
    for number, own in curves.items():
        style = {"color": ROLES[run_role(number)], "ls": DASHES[(number - 1) // NUM_SERIES % len(DASHES)]}
        for index, curve in enumerate(own):
            named = labels[number] if index == 0 and len(curves) <= MAX_LEGEND else None
            axes.plot(curve.tokens, curve.values, lw=1.8, marker="o", markersize=3, label=named, **style)
        if len(curves) > MAX_LEGEND:
            end = (own[-1].tokens[-1], own[-1].values[-1])
            text = axes.annotate(str(number), end, xytext=(5, -3), textcoords="offset points")
            text.set(color=ROLES["ink"], fontsize=FONT_SIZE)
    axes.margins(y=0.12)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(label)
    token_ticks(axes.xaxis)
    if len(curves) <= MAX_LEGEND:
        legend(axes, loc="best")
    return to_svg(figure, name)
