"""What subblocks cost, for the report: where the time goes, and how the sources of costs differ. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launch import figures
from launch.figures import Picture, picture
from launch.finished_run import PARENT, FinishedRun, read_architecture
from launch.quantities import serving
from launch.search_section import child_search
from puzzle.comparison import ComparedCost, compare, median_error
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import Architecture
from puzzle.tables import CostFile, CostTable, Phase

PhaseShown = Literal["decode", "prefill"]
PHASES: tuple[PhaseShown, ...] = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What one subblock variant, or what stands outside of the blocks, costs in every source."""

    subblock: str
    variant: str
    ms: dict[str, tuple[float, ...]]
    """Milliseconds by phase, in the order of the sources."""
    relative_difference: dict[str, tuple[float | None, ...]]
    """From the first source, by phase, for every further one; None where the first says 0."""


@dataclass(frozen=True, kw_only=True)
class CostComparison:
    """The sources of costs side by side, at one workload."""

    workload: str
    """In words."""
    sources: tuple[str, ...]
    hardware: tuple[str, ...]
    """Of every source."""
    rows: tuple[CostRow, ...]
    median_error: dict[str, tuple[float | None, ...]]
    """Median over variants of the absolute relative difference from the first source, by phase, for every further
    one."""


@dataclass(frozen=True, kw_only=True)
class ParentCost:
    """What the whole parent costs at one batch size, by one source."""

    source: str
    batch_size: int
    prefill_ms: float
    decode_ms: float
    tokens_per_s: float
    """Generated tokens of whole requests, prompt included."""
    memory_bytes: int


def run_costs(run: FinishedRun) -> CostFile | None:
    """The costs that chose the run's child; the last that were measured where no search read any."""
    search = child_search(run)
    artifact = (run.input_of(search, "costs") if search else None) or run.last("measure_costs")
    return CostFile.read(artifact.path / "costs.json") if artifact else None


def own_tables(costs: CostFile) -> dict[str, CostTable]:
    """The table of every source at the workload's own batch size, or the smallest where it has none."""
    return {source: next(iter(costs.of_source(source).values())) for source in costs.sources}


def compare_costs(costs: CostFile) -> CostComparison | None:
    """Sources side by side, every variant that takes time; None where there is one source alone."""
    tables = [table for table in own_tables(costs).values() if table.workload == costs.workload]
    if len(tables) < 2:
        return None
    first, *others = tables
    compared = [compare(first, other) for other in others]
    keys = dict.fromkeys((row.subblock, row.variant) for row in compared[0])
    by_key = [{(row.subblock, row.variant, row.phase): row for row in rows} for rows in compared]
    return CostComparison(
        workload=serving(vars(costs.workload)),
        sources=tuple(table.source for table in tables),
        hardware=tuple(table.hardware for table in tables),
        rows=tuple(
            _cost_row(*key, {phase: [rows[(*key, phase)] for rows in by_key] for phase in PHASES}) for key in keys
        ),
        median_error={phase: tuple(median_error(rows, phase) for rows in compared) for phase in PHASES},
    )


def _cost_row(subblock: str, variant: str, pairs: dict[PhaseShown, list[ComparedCost]]) -> CostRow:
    return CostRow(
        subblock=subblock,
        variant=variant or "embedding and head",
        ms={phase: (cells[0].measured_ms, *(cell.analytic_ms for cell in cells)) for phase, cells in pairs.items()},
        relative_difference={
            phase: tuple(cell.relative_difference for cell in cells) for phase, cells in pairs.items()
        },
    )


def parent_by_batch_size(costs: CostFile, parent: Architecture) -> list[ParentCost]:
    """The whole parent by source and batch size; empty where there is one batch size alone."""
    rows = []
    for table in costs.tables:
        size, total = table.workload.batch_size, table.model(block.name for block in parent.blocks)
        rows.append(
            ParentCost(
                source=table.source,
                batch_size=size,
                prefill_ms=total.prefill_ms,
                decode_ms=total.decode_ms,
                tokens_per_s=1000 * size * table.workload.generated_tokens / total.request_ms,
                memory_bytes=total.memory_bytes,
            )
        )
    return rows if len({row.batch_size for row in rows}) > 1 else []


def latency_pictures(run: FinishedRun, costs: CostFile) -> Iterator[Picture]:
    """Where the time goes, in the parent, the child and the fused child."""
    # A model that was trained on costs what the fused one does; the timed one has a measurement to compare with.
    fused = run.models[run.timed_name] if run.timed_name else run.final
    child = run.unfused_of(fused)
    unfused = read_architecture(child)
    models = {PARENT: run.parent, "child": child} | ({} if fused is child else {"fused": fused})
    names = {artifact.manifest.fingerprint: name for name, artifact in run.models.items()}
    tables, timed = own_tables(costs), _timed(run, costs.workload)
    if not all(_covers(table, unfused) for table in tables.values()):
        models = {PARENT: run.parent}
    panels = {
        title: [
            figures.LatencyBar(
                name=f"{label}, {source}",
                parts=latency_parts(read_architecture(model), unfused, table, phase),
                whole_ms=timed.get(names.get(model.manifest.fingerprint), {}).get(f"{phase}_ms"),
            )
            for label, model in models.items()
            for source, table in tables.items()
        ]
        for phase, title in zip(PHASES, ("decode, one token of each sequence", "prefill, all prompts"), strict=True)
    }
    yield picture(
        "Where the time goes",
        f"Summed subblock costs, {', '.join(f'{source} on {table.hardware}' for source, table in tables.items())}; "
        f"{serving(vars(costs.workload))}. A fused FFN costs what its members cost, less the saving of every merge.",
        figures.latency_breakdown(panels),
        wide=True,
    )


def _covers(table: CostTable, unfused: Architecture) -> bool:
    """Whether the space that costs were measured over has the variants of a model; one from elsewhere may differ."""
    known = {(row.subblock, row.variant) for row in table.subblocks}
    needed = {("attention", block.attention.name) for block in unfused.blocks}
    return needed | {("ffn", block.ffn.name) for block in unfused.blocks} <= known


def _timed(run: FinishedRun, workload: WorkloadConfig) -> dict[str | None, dict[str, Any]]:
    """Whole models by name, where stage benchmark timed them in the situation that the costs are of."""
    benchmark = run.document("benchmark", "benchmark.json")
    if benchmark is None or WorkloadConfig(**benchmark["workload"]) != workload:
        return {}
    return benchmark["models"]


def latency_parts(model: Architecture, unfused: Architecture, table: CostTable, phase: Phase) -> dict[str, float]:
    """Predicted milliseconds of a model's attentions, its FFNs, and its embedding and head.

    Args:
        model: what runs.
        unfused: the same model before fusion, whose blocks the table knows; read for the members of fused blocks.
        table: costs of subblocks.
        phase: decode of one token, or prefill of the prompt.
    """
    members = {index: block for block in unfused.blocks for index in block.member_indices}
    metric = f"{phase}_ms"
    attention = ffn = 0.0
    for block in model.blocks:
        is_new = block.is_fused and block not in unfused.blocks
        parts = [members[index] for index in block.member_indices] if is_new else [block]
        attention += sum(getattr(table.subblock("attention", part.attention.name), metric) for part in parts)
        ffn += sum(getattr(table.subblock("ffn", part.ffn.name), metric) for part in parts)
        ffn -= (len(parts) - 1) * table.merge_saving_ms(phase)
    return {"attention": attention, "FFN": ffn, "embedding and head": getattr(table.overhead, metric)}
