"""The picture of a forecast. Torch-free."""

from __future__ import annotations

import numpy as np

from launch.canvas import PARENT, ROLES, legend, new_figure, to_svg, token_ticks
from launch.forecast import LABELS, LEVEL, Forecast
from launch.forecast_fit import Family

AHEAD = 4.0
"""End of the tokens shown, over those so far, or over the target's where it comes before."""


def forecast_picture(family: Family, forecast: Forecast, *, name: str) -> str:
    """Points, the middle of the family and its interval, and the level of the target, over tokens of the phase."""
    curve = family.curve
    last = float(curve.tokens[-1])
    end = max(last, forecast.max_tokens or 0.0) * AHEAD
    first = float(curve.tokens[1]) / 2
    grid = np.geomspace(first, end, 160)
    low, middle, high = np.quantile(family.points(grid), [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2], axis=0)
    figure, axes = new_figure(width=520, height=320)
    axes.fill_between(grid, low, high, color=ROLES["series-1"], alpha=0.18, lw=0, label=f"{LEVEL:.0%} interval")
    seen = grid <= last
    axes.plot(grid[seen], middle[seen], color=ROLES["series-1"], lw=1.8, label="fit")
    axes.plot(grid[~seen], middle[~seen], color=ROLES["series-1"], lw=1.8, ls=(0, (2, 2)), label="forecast")
    axes.plot(
        curve.tokens[1:], curve.values[1:], "o", color=ROLES["series-2"], markersize=3.8, zorder=3, label="measured"
    )
    axes.axhline(
        forecast.target_loss,
        color=ROLES[PARENT],
        lw=1.3,
        ls=(0, (5, 3)),
        label=f"{100 * forecast.target:g} % recovered",
    )
    needed = forecast.tokens_to_target.middle
    if needed is not None and not forecast.reached and needed <= end:
        axes.plot(needed, forecast.target_loss, "D", color=ROLES["series-1"], markersize=7, zorder=4)
    axes.set_xscale("log")
    axes.set_ylim(bottom=min(float(low.min()), forecast.target_loss) * 0.97)
    token_ticks(axes.xaxis)
    axes.set_xlabel("training tokens of this step")
    axes.set_ylabel(f"{LABELS[forecast.metric]}, nats per token")
    legend(axes, loc="best")
    return to_svg(figure, name)
