"""What figures are drawn on. The only module that imports matplotlib, and only when a figure is drawn. Torch-free.

Sizes are CSS pixels. Colours are roles: what is drawn in the colour of a role comes out as a CSS variable, so that one
picture fits the light and the dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ROLES = {
    "ink": "#1b1f27",
    "muted": "#5f6876",
    "line": "#dfe3e9",
    "panel": "#fefefe",
    "series-0": "#5f6877",
    "series-1": "#2c6bd2",
    "series-2": "#d9722a",
    "series-3": "#2b8f62",
    "series-4": "#7f56c5",
    "series-5": "#c23f66",
    "series-6": "#1c8a9c",
}
"""CSS variable -> its colour on the light page, which is also what it falls back to outside of the page."""

PARENT = "series-0"
"""Role of the parent, wherever models stand side by side."""

FONT_SIZE = 11.5
TICK_SIZE = 11.0
NUM_SERIES = sum(role.startswith("series-") for role in ROLES) - 1


def stand_alone(svg: str) -> str:
    """A figure of the report's page as a file of its own: on the light page's ground, in plain colours."""
    svg = re.sub(r"var\(--[\w-]+, (#[0-9a-f]+)\)", r"\1", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    spaces = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    ground = f'<rect width="100%" height="100%" fill="{ROLES["panel"]}"/>'
    # Viewers outside of a browser follow the old spelling of references alone.
    content = svg[opening.end() :].replace(" href=", " xlink:href=")
    return opening.group().replace("<svg", "<svg" + spaces, 1) + ground + content


def series_role(index: int) -> str:
    """Role of the ``index``-th part of a whole."""
    return f"series-{1 + index % NUM_SERIES}"


def model_role(index: int) -> str:
    """Role of the ``index``-th model in pipeline order, of which the parent is the first."""
    return PARENT if index == 0 else series_role(index - 1)


def new_figure(*, width: int, height: int, rows: int = 1, columns: int = 1, grid: bool = True) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` CSS pixels and its axes: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    axes = figure.subplots(rows, columns)
    for item in figure.axes:
        _style(item, grid=grid)
    return figure, axes


def _style(axes: Axes, *, grid: bool) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(ROLES["line"])
    axes.tick_params(which="both", colors=ROLES["muted"], labelsize=TICK_SIZE, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ROLES["muted"], fontsize=FONT_SIZE)
    if grid:
        axes.grid(color=ROLES["line"], lw=0.8)
        axes.set_axisbelow(True)


def legend(owner: Axes | Figure, *args: Any, **place: Any) -> None:
    """A frameless legend of an axes or a figure."""
    owner.legend(*args, frameon=False, labelcolor=ROLES["ink"], fontsize=FONT_SIZE, **place)


def block_ticks(axis: Axis, num_blocks: int) -> None:
    """Ticks at whole blocks, at most 14 of them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=min(num_blocks, 14), integer=True, min_n_ticks=1))


def token_ticks(axis: Axis) -> None:
    """Tick labels such as 400k and 20B."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    engineering = EngFormatter(sep="")
    axis.set_major_formatter(FuncFormatter(lambda value, _: engineering(value).replace("G", "B")))


def heat_map(axes: Axes, values: Any, *, low: float, high: float, aspect: Literal["equal", "auto"]) -> Any:
    """``values [rows, columns]`` as colours on a log scale from ``low`` to ``high``; NaN stays empty."""
    from matplotlib.colors import LogNorm

    norm = LogNorm(low, high, clip=True)
    return axes.imshow(values, norm=norm, cmap="viridis", aspect=aspect, interpolation="none")


def colour_bar(figure: Figure, image: Any, axes: Axes, label: str, ticks: Mapping[float, str] | None = None) -> None:
    """The scale of a heat map; ``ticks`` are values and what to write beside them, None: powers of ten."""
    bar = figure.colorbar(image, ax=axes, pad=0.02, shrink=0.9, aspect=24)
    if ticks is not None:
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", colors=ROLES["muted"], labelsize=TICK_SIZE, length=3)
    bar.set_label(label, color=ROLES["muted"], fontsize=FONT_SIZE, labelpad=9)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page; ``name`` keeps its ids apart from others'."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: the page's own font, selectable, and a third of the size.
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style sheet, ids of groups and fixed sizes would reach into the page around the picture.
    svg = re.sub(r"<(metadata|style)[ >].*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role}, {colour})")
    return svg.replace("<svg", f'<svg class="figure" role="img" aria-label="{name}"', 1)
