"""A cost table against another of the same workload, variant by variant. Torch-free."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from distill.config import require
from puzzle.tables import CostTable


@dataclass(frozen=True, kw_only=True)
class ComparedCost:
    """One variant in one phase, measured and computed."""

    batch_size: int
    subblock: str
    """attention or ffn; outside: embedding, final norm and head."""
    variant: str
    """Empty outside of the blocks."""
    phase: str
    """prefill or decode."""
    measured_ms: float
    analytic_ms: float
    relative_difference: float | None
    """``analytic_ms / measured_ms - 1``; None where the measurement was clamped to 0."""


def compare(measured: CostTable, analytic: CostTable) -> list[ComparedCost]:
    """Every variant of ``measured`` that takes time, and what stands outside of the blocks, in both phases.

    Raises:
        ValueError: the tables are of two workloads, or ``analytic`` lacks a variant.
    """
    require(
        measured.workload == analytic.workload,
        f"costs: the tables from {measured.source!r} and {analytic.source!r} are of two workloads, "
        f"{measured.workload} and {analytic.workload}; compare tables of one",
    )
    pairs = [("outside", "", measured.overhead, analytic.overhead)] + [
        (row.subblock, row.variant, row, analytic.subblock(row.subblock, row.variant))
        for row in measured.subblocks
        if row.variant != "no_op"
    ]
    return [
        ComparedCost(
            batch_size=measured.workload.batch_size,
            subblock=subblock,
            variant=variant,
            phase=phase,
            measured_ms=seen_ms,
            analytic_ms=computed_ms,
            relative_difference=computed_ms / seen_ms - 1 if seen_ms > 0 else None,
        )
        for subblock, variant, seen, computed in pairs
        for phase, seen_ms, computed_ms in (
            ("prefill", seen.prefill_ms, computed.prefill_ms),
            ("decode", seen.decode_ms, computed.decode_ms),
        )
    ]


def median_error(rows: Iterable[ComparedCost], phase: str) -> float | None:
    """Median size of the relative difference over the subblock variants in one phase; None where there is none."""
    errors = [
        abs(row.relative_difference)
        for row in rows
        if row.phase == phase and row.subblock != "outside" and row.relative_difference is not None
    ]
    return median(errors) if errors else None


def write_csv(rows: Sequence[ComparedCost], path: Path) -> None:
    """One line per row under the fields' names; None is empty."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(ComparedCost)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
