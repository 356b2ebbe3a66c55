"""The figures of the report, each an inline SVG. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from launch.canvas import (
    FONT_SIZE,
    PARENT,
    ROLES,
    block_ticks,
    colour_bar,
    heat_map,
    legend,
    model_role,
    new_figure,
    series_role,
    to_svg,
    token_ticks,
)
from launch.recovery import RecoveryCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_HEIGHT = 14
"""Pixels between two labels."""

LOWEST_DEPENDENCY, HIGHEST_DEPENDENCY = 2.0**-9, 2.0**-1
"""Ends of the colour scale (FFN Fusion, fig. 3)."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    svg: Markup
    wide: bool = False
    """Takes the page's whole width."""


def picture(title: str, caption: str, svg: str, *, wide: bool = False) -> Picture:
    """A figure of this module with its words."""
    return Picture(title=title, caption=caption, svg=Markup(svg), wide=wide)


@dataclass(frozen=True, kw_only=True)
class ModelPoint:
    """One model in the picture of quality against latency."""

    name: str
    decode_ms: float
    """Per token."""
    lm_loss: float
    """Nats per token."""


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """One child that the search found."""

    latency_frac: float
    """Predicted latency after fusion, as a fraction of the parent's at the same batch size."""
    score: float
    batch_size: int | None
    """That it was found at."""


@dataclass(frozen=True, kw_only=True)
class LatencyBar:
    """One stacked bar of the latency breakdown, in milliseconds."""

    name: str
    parts: Mapping[str, float]
    whole_ms: float | None
    """What the whole model took in stage benchmark."""


def quality_against_latency(models: Sequence[ModelPoint]) -> str:
    """LM loss against decode latency, in pipeline order: surgery moves left and up, training moves down."""
    figure, axes = new_figure(width=520, height=340)
    axes.axhline(models[0].lm_loss, color=ROLES["muted"], lw=1, ls=(0, (2, 3)))
    arrow = {"arrowstyle": "-|>", "color": ROLES["muted"], "shrinkA": 7, "shrinkB": 7, "lw": 1.1, "alpha": 0.75}
    for before, after in itertools.pairwise(models):
        ends = (before.decode_ms, before.lm_loss), (after.decode_ms, after.lm_loss)
        axes.annotate("", xytext=ends[0], xy=ends[1], arrowprops=arrow)
    for index, model in enumerate(models):
        axes.plot(model.decode_ms, model.lm_loss, "o", color=ROLES[model_role(index)], markersize=9)
    axes.margins(x=0.2, y=0.2)
    _label_points(axes, models)
    axes.set_xlabel("decode latency, ms per token")
    axes.set_ylabel("LM loss, nats per token")
    return to_svg(figure, "quality against latency")


def _label_points(axes: Axes, models: Sequence[ModelPoint]) -> None:
    """Names beside the points, to the right in the left half and to the left in the other, none on another."""
    centre = sum(axes.get_xlim()) / 2
    lowest_free = {True: float("inf"), False: float("inf")}
    for index, model in sorted(enumerate(models), key=lambda item: -item[1].lm_loss):
        point = (model.decode_ms, model.lm_loss)
        right = model.decode_ms <= centre
        height = axes.transData.transform(point)[1]
        # The parent's name stands below its point: arrows leave upwards.
        shift = min(5.0 if index else -15.0, lowest_free[right] - height)
        lowest_free[right] = height + shift - LINE_HEIGHT
        axes.annotate(
            model.name,
            point,
            xytext=(10 if right else -10, shift),
            textcoords="offset points",
            ha="left" if right else "right",
            color=ROLES[model_role(index)],
            fontsize=FONT_SIZE,
            fontweight="bold",
        )


def pareto_front(front: Sequence[SearchPoint], chosen: Sequence[SearchPoint], label: str) -> str:
    """Predicted latency against summed score; the solutions that were kept are marked, batch sizes by colour."""
    figure, axes = new_figure(width=520, height=340)
    sizes = sorted({point.batch_size for point in (*front, *chosen)}, key=lambda size: size or 0)
    colours = {size: ROLES[series_role(index if index == 0 else index + 1)] for index, size in enumerate(sizes)}
    ordered = sorted(front, key=lambda point: point.latency_frac)
    if ordered:
        axes.plot([p.latency_frac for p in ordered], [p.score for p in ordered], color=ROLES["series-1"], lw=1.6)
    for size in sizes:
        points = [point for point in ordered if point.batch_size == size]
        style = {"color": colours[size], "ls": "none", "marker": "o", "markersize": 5.5, "zorder": 2.5}
        label_of_size = f"optimum at a budget{f', batch {size}' if len(sizes) > 1 else ''}"
        if points:
            axes.plot([p.latency_frac for p in points], [p.score for p in points], label=label_of_size, **style)
    for rank, point in enumerate(chosen):
        size, name = (10, "chosen") if rank == 0 else (6, "next best" if rank == 1 else None)
        place = (point.latency_frac, point.score)
        axes.plot(*place, "D", color=ROLES["series-2"], markersize=size, zorder=3, label=name)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("predicted latency, fraction of the parent's")
    axes.set_ylabel(f"summed {label}")
    legend(axes, loc="best")
    return to_svg(figure, "Pareto front")


def additivity(groups: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """Sum of scores (x) against what the child really does (y), both > 0, log-log, with the diagonal of exact sums.

    Args:
        groups: children by kind, each a pair of sum and realised value.
        label: of the realised value.
    """
    figure, axes = new_figure(width=520, height=400)
    values = [value for points in groups.values() for point in points for value in point]
    ends = min(values) / 1.4, max(values) * 1.4
    axes.plot(ends, ends, color=ROLES["muted"], lw=1, ls=(0, (2, 3)), label="sum = realised")
    for index, (name, points) in enumerate(groups.items()):
        style = {"color": ROLES[series_role(index)], "ls": "none", "marker": "o", "markersize": 6, "label": name}
        axes.plot(*zip(*points, strict=True), **style)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ticks = _round_values(*ends)
    labels = [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.set_xlabel("sum of replace-1-block scores")
    axes.set_ylabel(label)
    legend(axes, loc="best")
    return to_svg(figure, "additivity")


def _round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten between the ends, or the powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    return [value for value in values if low <= value <= high]


def recovery_curves(curves: Sequence[RecoveryCurve], *, levels: Mapping[str, float], label: str, name: str) -> str:
    """One held-out metric against training tokens, a line per step, with named horizontal levels to compare with."""
    figure, axes = new_figure(width=520, height=320)
    for index, curve in enumerate(curves):
        # Colours that surgery leaves free in the table of models: child and fused come before.
        line = {"lw": 2, "marker": "o", "markersize": 3.5, "label": curve.step}
        axes.plot(curve.tokens, curve.values, color=ROLES[model_role(index + 3)], **line)
    for level, value in levels.items():
        axes.axhline(value, color=ROLES[PARENT], lw=1.3, ls=(0, (5, 3)), label=level)
    axes.margins(y=0.12)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(label)
    token_ticks(axes.xaxis)
    legend(axes, loc="best")
    return to_svg(figure, name)


def dependency_matrix(matrix: Sequence[Sequence[float | None]], attention_free: Sequence[bool] = ()) -> str:
    """Dependency of block j (column) on block i (row), log scale (FFN Fusion, fig. 3); None stays empty.

    Args:
        matrix: cosine distances, ``[num_blocks][num_blocks]``.
        attention_free: blocks whose runs are outlined, two neighbours at least; empty: none.
    """
    figure, axes = new_figure(width=520, height=440, grid=False)
    image = heat_map(
        axes, np.array(matrix, dtype=float), low=LOWEST_DEPENDENCY, high=HIGHEST_DEPENDENCY, aspect="equal"
    )
    _outline_runs(axes, attention_free)
    axes.set_xlabel("measured block j")
    axes.set_ylabel("removed block i", labelpad=8)
    for axis in (axes.xaxis, axes.yaxis):
        block_ticks(axis, len(matrix))
    ticks = {2.0**-power: f"2⁻{'⁰¹²³⁴⁵⁶⁷⁸⁹'[power]}" for power in range(9, 0, -2)}
    ticks[LOWEST_DEPENDENCY] = f"≤ {ticks[LOWEST_DEPENDENCY]}"
    ticks[HIGHEST_DEPENDENCY] = f"≥ {ticks[HIGHEST_DEPENDENCY]}"
    colour_bar(figure, image, axes, "cosine distance", ticks)
    return to_svg(figure, "dependency matrix")


def _outline_runs(axes: Axes, attention_free: Sequence[bool]) -> None:
    """The part of the matrix within every run, named below the diagonal where the run is longer than a label high."""
    pixels_per_block = axes.get_window_extent().height / max(len(attention_free), 1)
    for is_free, run in itertools.groupby(range(len(attention_free)), key=attention_free.__getitem__):
        first, *others = run
        if not is_free or not others:
            continue
        start, stop = first - 0.5, others[-1] + 0.5
        axes.plot([start, stop, stop, start], [start, start, stop, start], color=ROLES["series-2"], lw=1.8)
        if (stop - start) * pixels_per_block >= LINE_HEIGHT:
            middle = (start + stop) / 2
            name = f"{first}-{others[-1]}"
            label = axes.annotate(name, (middle, middle), xytext=(-8, -3), textcoords="offset points")
            label.set(color=ROLES["series-2"], fontsize=FONT_SIZE, ha="right", va="top")


def direction_change(distance: Sequence[float], ratio: Sequence[float], attention_free: Sequence[bool]) -> str:
    """How far every block f turns its input X, and how much h(X) = f(X) - X it adds (FFN Fusion, section 5.5).

    Args:
        distance: cosine distance between input and output, per block.
        ratio: norm of what the block adds over the norm of its input, per block.
        attention_free: blocks that stand out.
    """
    figure, rows = new_figure(width=520, height=440, rows=2)
    groups = ((False, "series-1", "with attention"), (True, "series-2", "attention-free"))
    labels = "cosine distance of X to f(X)", "‖h(X)‖ / ‖X‖"
    for axes, values, label in zip(rows, (distance, ratio), labels, strict=True):
        axes.plot(range(len(values)), values, color=ROLES["series-1"], lw=1.4)
        for is_free, role, name in groups:
            blocks = [block for block, free in enumerate(attention_free) if free == is_free]
            style = {"color": ROLES[role], "markersize": 5, "label": name, "zorder": 3}
            axes.plot(blocks, [values[block] for block in blocks], "o", **style)
        # The first block turns the embedding round and would flatten all others on a linear scale.
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylabel(label)
        block_ticks(axes.xaxis, len(values))
    rows[1].set_xlabel("block")
    legend(rows[0], loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return to_svg(figure, "direction change")


def latency_breakdown(panels: Mapping[str, Sequence[LatencyBar]]) -> str:
    """Stacked bars of milliseconds, one panel per title."""
    num_bars = max(len(bars) for bars in panels.values())
    figure, columns = new_figure(width=1080, height=110 + 34 * num_bars, columns=len(panels))
    for axes, (title, bars) in zip(columns, panels.items(), strict=True):
        _stacked_bars(axes, bars)
        axes.set_title(title, loc="left", color=ROLES["ink"], fontsize=12.5)
    handles, labels = columns[0].get_legend_handles_labels()
    legend(figure, handles, labels, loc="outside upper right", ncols=len(labels))
    return to_svg(figure, "latency breakdown")


def _stacked_bars(axes: Axes, bars: Sequence[LatencyBar]) -> None:
    rows = range(len(bars))
    left = [0.0] * len(bars)
    for index, part in enumerate(bars[0].parts):
        widths = [bar.parts[part] for bar in bars]
        axes.barh(rows, widths, left=left, height=0.62, color=ROLES[series_role(index)], label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    whole = [(bar.whole_ms, row) for row, bar in zip(rows, bars, strict=True) if bar.whole_ms is not None]
    if whole:
        milliseconds, marked = zip(*whole, strict=True)
        axes.plot(milliseconds, marked, "|", color=ROLES["ink"], markersize=20, mew=2, label="whole model, benchmarked")
    ends = [max(total, bar.whole_ms or 0.0) for total, bar in zip(left, bars, strict=True)]
    for row, bar, total, end in zip(rows, bars, left, ends, strict=True):
        text = f"{total:#.3g}" + (f", whole {bar.whole_ms:#.3g}" if bar.whole_ms is not None else "")
        label = axes.annotate(text, (end, row), xytext=(7, 0), textcoords="offset points", va="center")
        label.set(color=ROLES["ink"], fontsize=FONT_SIZE)
    axes.set_xlim(0, max(ends) * 1.4)
    axes.set_yticks(rows, [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms")


def score_heat_map(
    variants: Sequence[str], scores: Sequence[Sequence[float | None]], chosen: Sequence[str], label: str, *, name: str
) -> str:
    """Replace-1-block score of every variant (row) at every block (column); a ring marks what the search chose.

    Args:
        variants: row names.
        scores: ``[len(variants)][num_blocks]``, on a log scale that shows 0 and below (the parent's own variant) in its
            lowest colour; None where the space has no such variant.
        chosen: the chosen variant of every block; empty without a search. One without a row is not marked.
        label: of the scale.
        name: of the picture.
    """
    values = np.array(scores, dtype=float)
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
    values[values <= 0] = low
    row_height = max(16, min(26, 520 // len(variants)))
    figure, axes = new_figure(width=1080, height=90 + row_height * len(variants), grid=False)
    image = heat_map(axes, values, low=low, high=max(high, 1.01 * low), aspect="auto")
    rows = {variant: row for row, variant in enumerate(variants)}
    rings = [(block, rows[variant]) for block, variant in enumerate(chosen) if variant in rows]
    for ring in rings:
        for colour, width in (("black", 3.6), ("white", 1.8)):
            axes.plot(*ring, "o", mfc="none", mec=colour, mew=width, markersize=8)
    axes.set_yticks(range(len(variants)), variants)
    axes.set_xlabel("block")
    block_ticks(axes.xaxis, values.shape[1])
    colour_bar(figure, image, axes, label)
    return to_svg(figure, name)
