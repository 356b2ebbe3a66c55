"""Stage measure_costs: parent and search space -> what every variant costs, from every source, at every batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from distill import distributed
from distill.engine.base import resolve_device
from launch.externals import hardware
from launch.quantities import num_bytes, serving
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import MeasureCostsStage
from puzzle.analytic import AllReduce, Reduction, analytic_table, modelled_all_reduce
from puzzle.calibrate import calibrate, calibrate_all_reduce, can_measure_all_reduce, measured_all_reduce_ms
from puzzle.comparison import ComparedCost, compare, median_error, write_csv
from puzzle.config import HardwareConfig, WorkloadConfig
from puzzle.cost import measured_table, subblock_variants
from puzzle.latency import cpu_threads, require_positions
from puzzle.model.architecture import Architecture, require_sequential
from puzzle.model.checkpoint import read_architecture
from puzzle.model.hf_config import hf_config
from puzzle.shard import Shard, Subblock
from puzzle.tables import CostFile, CostTable

MakeTable = Callable[[WorkloadConfig], CostTable]


def run(config: MeasureCostsStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``costs.json`` and, where both are asked for, ``comparison.csv`` of measured against analytic costs.

    No weights of the parent are read. Where as many processes run as the workload has ranks, all of them measure the
    all-reduces; the rest is done by the first one, on its device alone.
    """
    parent, workload = read_architecture(inputs["parent"].path), config.workload
    require_sequential(parent.parallel_windows, "measure_costs")
    require_positions(workload, parent, "parent")
    subblocks, shard = subblock_variants(parent, config.space), Shard(parent=parent, num_ranks=workload.tensor_parallel)
    for subblock in subblocks:
        shard.shapes(subblock)  # whatever cannot be dealt fails before anything is measured
    if "vllm" in config.costs.sources and distributed.is_main():
        from puzzle.vllm_costs import require_vllm

        require_vllm(parent, subblocks, workload=workload)
    sizes = dict.fromkeys((workload.batch_size, *config.costs.batch_sizes))
    workloads = [replace(workload, batch_size=size) for size in sizes]
    with cpu_threads(workload.num_cpu_threads):
        all_reduce = _measured_all_reduce(config, parent, workloads)
        rates = _rates(config, parent)
        if not distributed.is_main():
            return StageResult(headline="all-reduces, measured together with the first process")
        makers = _makers(config, parent, subblocks, rates, all_reduce)
        tables = tuple(makers[source](w) for source in config.costs.sources for w in workloads)
    file = CostFile(architecture=hf_config(parent, workload.dtype), workload=workload, tables=tables)
    file.write(context.out / "costs.json")
    compared = _compared(file)
    if compared:
        write_csv(compared, context.out / "comparison.csv")
    return _result(file, parent, compared, rates)


def _measured_all_reduce(
    config: MeasureCostsStage, parent: Architecture, workloads: Sequence[WorkloadConfig]
) -> AllReduce | None:
    """The all-reduces of the measured tables, by measurement; None where they have to be modelled."""
    if "measured" not in config.costs.sources or not can_measure_all_reduce(config.workload):
        return None
    reductions = [Reduction(parent=parent, workload=w, all_reduce=lambda size: 0.0) for w in workloads]
    sizes = set[int]().union(*(reduction.sizes() for reduction in reductions))
    device = resolve_device(config.engine)
    return measured_all_reduce_ms(sizes, workload=config.workload, device=device, config=config.costs).__getitem__


def _rates(config: MeasureCostsStage, parent: Architecture) -> HardwareConfig:
    """The hardware file, its null rates calibrated where it names no other device; all processes must call it."""
    rates, costs = config.costs.hardware, config.costs
    if rates.name is not None:
        return rates
    if "analytic" in costs.sources:
        device = resolve_device(config.engine)
        rates = calibrate_all_reduce(rates, workload=config.workload, device=device, config=costs)
        if distributed.is_main():
            rates = calibrate(rates, parent, workload=config.workload, device=device, config=costs)
    return replace(rates, name=hardware(config)["device"])


def _makers(
    config: MeasureCostsStage,
    parent: Architecture,
    subblocks: Sequence[Subblock],
    rates: HardwareConfig,
    all_reduce: AllReduce | None,
) -> dict[str, MakeTable]:
    """What makes a table, by source."""

    def measured(workload: WorkloadConfig) -> CostTable:
        table = measured_table(
            parent,
            subblocks,
            workload=workload,
            config=config.costs,
            device=resolve_device(config.engine),
            hardware=hardware(config)["device"],
            all_reduce=all_reduce or modelled_all_reduce(rates, workload.tensor_parallel),
        )
        return _with_origin(table, "measured" if all_reduce else "modelled")

    def analytic(workload: WorkloadConfig) -> CostTable:
        return _with_origin(analytic_table(parent, subblocks, workload=workload, hardware=rates), "modelled")

    def vllm(workload: WorkloadConfig) -> CostTable:
        from puzzle.vllm_costs import vllm_table

        here = hardware(config)["device"]
        return vllm_table(parent, subblocks, workload=workload, config=config.costs, hardware=here)

    return {"measured": measured, "analytic": analytic, "vllm": vllm}


def _with_origin(table: CostTable, all_reduce: Literal["measured", "modelled"]) -> CostTable:
    return replace(table, all_reduce=all_reduce) if table.workload.tensor_parallel > 1 else table


def _compared(file: CostFile) -> list[ComparedCost]:
    if not {"measured", "analytic"} <= set(file.sources):
        return []
    measured, analytic = file.of_source("measured"), file.of_source("analytic")
    return [row for size, table in measured.items() for row in compare(table, analytic[size])]


def _result(
    file: CostFile, parent: Architecture, compared: Sequence[ComparedCost], rates: HardwareConfig
) -> StageResult:
    """The first source at the workload's own batch size leads."""
    table = file.tables[0]
    total = table.model(block.name for block in parent.blocks)
    attention_ms = sum(table.subblock("attention", block.attention.name).decode_ms for block in parent.blocks)
    attention_frac = attention_ms / total.decode_ms if total.decode_ms else 0.0
    off = {phase: median_error(compared, phase) for phase in ("prefill", "decode")}
    served = serving(vars(table.workload)) + (f", all-reduce {table.all_reduce}" if table.all_reduce else "")
    headline = (
        f"decode {total.decode_ms:.3g} ms, prefill {total.prefill_ms:.3g} ms, {num_bytes(total.memory_bytes)} parent "
        f"({table.source}, {table.hardware}, {served}), "
        f"attention {attention_frac:.0%} of decode"
    )
    if off["decode"] is not None:
        headline += f"; analytic off by {off['decode']:.0%} median"
    metrics: dict[str, Any] = {
        "parent_prefill_ms": total.prefill_ms,
        "parent_decode_ms": total.decode_ms,
        "parent_memory_bytes": total.memory_bytes,
        "attention_decode_frac": attention_frac,
        "source": table.source,
        "all_reduce": table.all_reduce,
        "workload": vars(table.workload),
        "analytic_median_relative_difference": off,
        "clamped": [f"batch {t.workload.batch_size}: {name}" for t in file.tables for name in t.clamped],
        "hardware": vars(rates),
    }
    return StageResult(headline=headline, metrics=metrics)
