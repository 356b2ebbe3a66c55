"""The architecture strip as a figure, where there is no page around it. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.canvas import FONT_SIZE, ROLES, block_ticks, new_figure, stand_alone, to_svg
from launch.strip import ArchitectureStrip, Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED_BLOCKS = 24
"""Most blocks whose variants are named in their columns."""


def strip_svg(strip: ArchitectureStrip) -> str:
    """A stand-alone SVG: attentions above, darker with more KV heads; FFNs below, as high as they are wide, fused ones
    in a colour of their own, with a bracket under each group."""
    count = len(strip.columns)
    figure, axes = new_figure(width=max(520, 46 * min(count, LABELLED_BLOCKS) + 90), height=230, grid=False)
    for column in strip.columns:
        _draw(axes, column, named=count <= LABELLED_BLOCKS)
    for group in strip.groups:
        axes.plot([group.first - 0.45, group.last + 0.45], [-0.08, -0.08], color=ROLES["series-2"], lw=3)
        label = axes.annotate(f"{group.num_members} fused", ((group.first + group.last) / 2, -0.13), ha="center")
        label.set(color=ROLES["series-2"], fontsize=FONT_SIZE, va="top")
    axes.set(xlim=(-0.6, count - 0.4), ylim=(-0.35, 1.45))
    axes.set_yticks([0.5, 1.25], ["FFN", "attention"])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("block of the parent")
    block_ticks(axes.xaxis, count)
    return stand_alone(to_svg(figure, "architecture strip"))


def _draw(axes: Axes, column: Column, *, named: bool) -> None:
    place, width = column.block, 0.88
    linear = ROLES["series-6"]
    for height, bottom in ((0.28, 1.1), (1.0, 0.0)):
        axes.bar(place, height, bottom=bottom, width=width, fill=False, edgecolor=ROLES["line"])
    if column.attention != "no_op":
        colour = linear if column.attention == "linear" else ROLES["series-1"]
        axes.bar(place, 0.28, bottom=1.1, width=width, color=colour, alpha=0.25 + 0.75 * column.attention_frac)
    if column.ffn != "no_op":
        plain = linear if column.ffn == "linear" else ROLES["series-3"]
        colour = ROLES["series-2"] if column.is_fused else plain
        axes.bar(place, max(column.ffn_frac, 0.04), width=width, color=colour)
    if named:
        for text, height in ((column.attention, 1.24), (column.ffn, 0.5)):
            label = axes.annotate(text.replace("no_op", ""), (place, height), ha="center", va="center")
            label.set(color=ROLES["ink"], fontsize=FONT_SIZE - 2)
