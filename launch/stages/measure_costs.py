"""Stage measure_costs: parent and search space -> what every variant costs on this device."""

from __future__ import annotations

from statistics import median

from distill.engine.base import resolve_device
from launch.externals import hardware
from launch.registry import MeasureCostsStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.analytic import analytic_table
from puzzle.cost import calibrate, measured_table, subblock_variants
from puzzle.latency import cpu_threads, require_positions, torch_dtype
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture
from puzzle.model.hf_config import hf_config
from puzzle.tables import CostFile, CostTable


def run(config: MeasureCostsStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``costs.json`` with a measured and an analytic table; no weights of the parent are read."""
    parent, workload = read_architecture(inputs["parent"].path), config.workload
    require_positions(workload, parent, "parent")
    subblocks = subblock_variants(parent, config.space)
    device = resolve_device(config.engine)

    with cpu_threads(workload.num_cpu_threads):
        rates = calibrate(config.costs.hardware, dtype=torch_dtype(workload), device=device, config=config.costs)
        measured = measured_table(parent, subblocks, workload=workload, config=config.costs, device=device)
    here = hardware(config)["device"]
    analytic = analytic_table(parent, subblocks, workload=workload, hardware=rates)
    CostFile(
        architecture=hf_config(parent, workload.dtype),
        hardware={"measured": here, "analytic": rates.name or here},
        workload=workload,
        tables={"measured": measured, "analytic": analytic},
    ).write(context.out / "costs.json")

    total = measured.model(block.name for block in parent.blocks)
    attention_frac = _attention_decode_ms(measured, parent) / total.decode_ms
    off = {name: _median_relative_difference(measured, analytic, f"{name}_ms") for name in ("prefill", "decode")}
    return StageResult(
        headline=(
            f"decode {total.decode_ms:.3g} ms parent (measured), attention {attention_frac:.0%}; "
            f"analytic off by {off['decode']:.0%} median"
        ),
        metrics={
            "parent_prefill_ms": total.prefill_ms,
            "parent_decode_ms": total.decode_ms,
            "parent_memory_bytes": total.memory_bytes,
            "attention_decode_frac": attention_frac,
            "analytic_median_relative_difference": off,
            "clamped": list(measured.clamped),
            "flops_per_s": rates.flops_per_s,
            "bytes_per_s": rates.bytes_per_s,
            "kernel_launch_s": rates.kernel_launch_s,
        },
    )


def _attention_decode_ms(table: CostTable, parent: Architecture) -> float:
    return sum(table.subblock("attention", block.attention.name).decode_ms for block in parent.blocks)


def _median_relative_difference(measured: CostTable, analytic: CostTable, column: str) -> float:
    """Over all variants that take time."""
    pairs = [
        (getattr(row, column), getattr(analytic.subblock(row.subblock, row.variant), column))
        for row in measured.subblocks
    ]
    differences = [abs(computed - seen) / seen for seen, computed in pairs if seen > 0]
    return median(differences) if differences else 0.0
