"""What a search chose, on the console, for those who brought tables of their own. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TITLES = {
    "prefill_ms": "prefill, ms",
    "decode_ms": "decode, ms per token",
    "request_ms": "request, ms",
    "memory_bytes": "memory, bytes",
    "params": "parameters",
    "kv_bytes_per_token": "KV cache, bytes per token",
}


def show(
    parent: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    solution: Mapping[str, Any],
    *,
    metric: str,
    console: Console | None = None,
) -> None:
    """Print which variant stands at every block, and what the whole costs beside the parent.

    Args:
        parent: the parent's own variant of every block.
        scores: scores by variant, block by block.
        solution: a row of ``solution.json``.
        metric: name of the scores.
        console: where to print; None: standard output.
    """
    console = console or Console(highlight=False)
    console.print(_blocks(parent, scores, solution, metric))
    console.print(_costs(solution))
    if solution["num_merges"]:
        fused_ms = _number(solution["predicted_fused_latency_ms"])
        console.print(
            f"after fusion ({solution['num_merges']} FFNs merged into a neighbour): {fused_ms} ms", style="dim"
        )


def _blocks(
    parent: Sequence[str], scores: Sequence[Mapping[str, float]], solution: Mapping[str, Any], metric: str
) -> Table:
    table = _table("blocks", "parent", "chosen", metric, text_columns=3)
    rows = list(enumerate(zip(parent, solution["blocks"], strict=True)))
    # Neighbours that took the same step share a line.
    for (own, chosen), run in groupby(rows, key=lambda row: row[1]):
        blocks = [block for block, _ in run]
        label = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
        score = sum(scores[block][chosen] for block in blocks)
        style = None if own == chosen else "bold"
        table.add_row(label, escape(own), escape(chosen), f"{score:.4g}", style=style)
    table.add_section()
    table.add_row("all", "", "", f"{solution['score']:.4g}", style="bold")
    return table


def _costs(solution: Mapping[str, Any]) -> Table:
    table = _table(f"at batch size {solution['batch_size']}", "parent", "chosen", "ratio", text_columns=1)
    for name, title in TITLES.items():
        if name in solution["costs"] and name in solution["parent_costs"]:
            before, after = solution["parent_costs"][name], solution["costs"][name]
            table.add_row(title, _number(before), _number(after), f"{after / before:.3f}x" if before else "")
    return table


def _table(*headers: str, text_columns: int) -> Table:
    table = Table(header_style="dim", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if index < text_columns else "right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
