"""The table that ends a run on the console. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.quantities import decimals, num_bytes, percent, ratio, scaled, serving

COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "params": lambda model: scaled(model["num_params"]),
    "KV/token": lambda model: num_bytes(model["kv_bytes_per_token"]),
    "ms/token": lambda model: decimals(model["decode_ms"], 2),
    "vs parent": lambda model: ratio(model["decode_latency_vs_parent"]),
    "LM loss": lambda model: decimals(model["lm_loss"], 3),
    "KLD": lambda model: decimals(model["kld"], 3),
    "recovery": lambda model: percent(model["lm_loss_gap_closed_frac"]),
}
"""Header -> cell of a model of ``report.json``."""


def print_summary(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the models of ``report`` side by side.

    Args:
        report: content of ``report.json``.
        console: where to print; None: standard output.
    """
    console = console or Console(highlight=False)
    table = Table(
        title=escape(report["run"]),
        title_justify="left",
        header_style="dim",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for header in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    for name, model in report["models"].items():
        style = "bold" if name == report["final_model"] else None
        table.add_row(name, *(cell(model) for cell in COLUMNS.values()), style=style)
    console.print(table)
    if report["workload"]:
        console.print(f"latency: {serving(report['workload'])}; {escape(report['hardware'])}", style="dim")
    if report["recovery_reference"]:
        console.print(
            f"recovery: share of the LM-loss gap between {report['recovery_reference']} and parent that is closed; "
            "losses in nats per token",
            style="dim",
        )
