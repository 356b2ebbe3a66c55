"""Do costs of subblocks add up to real models? ``python benchmarks/cost_sums.py PARENT [CHILD...] --dtype bfloat16``.

Measures every subblock that occurs in the models, on the parent's dimensions, and the models themselves, in one
process. Prints the summed costs beside the real times, and measured beside analytic costs of each subblock. A model is
a directory with its config.json: the weights that are timed are random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from distill.config import EngineConfig
from distill.engine.base import resolve_device
from puzzle.analytic import analytic_table
from puzzle.calibrate import calibrate
from puzzle.comparison import compare, median_error
from puzzle.config import CostConfig, HardwareConfig, WorkloadConfig
from puzzle.cost import measured_table, random_model
from puzzle.latency import cpu_threads, models_ms, torch_dtype
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="the parent's directory, then those of children")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prefill-tokens", type=int, default=128)
    parser.add_argument("--generated-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    workload = WorkloadConfig(
        batch_size=options.batch_size,
        prefill_tokens=options.prefill_tokens,
        generated_tokens=options.generated_tokens,
        dtype=options.dtype,
        num_cpu_threads=options.threads,
    )
    device = resolve_device(EngineConfig(device=options.device))
    architectures = {str(path): read_architecture(path) for path in options.models}
    with cpu_threads(options.threads):
        report(architectures, workload, CostConfig(repeats=options.repeats), device)


def report(
    architectures: dict[str, Architecture], workload: WorkloadConfig, config: CostConfig, device: torch.device
) -> None:
    """Print both tables."""
    parent = next(iter(architectures.values()))
    blocks = [block for architecture in architectures.values() for block in architecture.blocks]
    subblocks = tuple(dict.fromkeys([*(b.attention for b in blocks), *(b.ffn for b in blocks)]))
    rates = calibrate(HardwareConfig(name=str(device)), parent, workload=workload, device=device, config=config)
    measured = measured_table(
        parent,
        subblocks,
        workload=workload,
        config=config,
        device=device,
        hardware=str(device),
        all_reduce=lambda num_bytes: 0.0,
    )
    analytic = analytic_table(parent, subblocks, workload=workload, hardware=rates)
    print(
        f"{device}, {workload}\n{rates.flops_per_s / 1e12:.3g} TFLOPS, {rates.bytes_per_s / 1e9:.3g} GB/s, "
        f"{1e6 * rates.kernel_launch_s:.3g} us per kernel\n"
    )
    rows = compare(measured, analytic)
    print(f"{'subblock':<10} {'variant':<8} {'phase':<8} {'measured':>10} {'analytic':>10} {'off':>6}   ms")
    for row in rows:
        off = f"{row.relative_difference:+.0%}" if row.relative_difference is not None else ""
        names = f"{row.subblock:<10} {row.variant:<8} {row.phase:<8}"
        print(f"{names} {row.measured_ms:>10.4f} {row.analytic_ms:>10.4f} {off:>6}")
    for phase in ("prefill", "decode"):
        error = median_error(rows, phase)
        print(f"median error, {phase}: {'none' if error is None else f'{error:.1%}'}")
    print(f"clamped: {', '.join(measured.clamped) or 'none'}\n")

    models = {name: random_model(a, dtype=torch_dtype(workload), device=device) for name, a in architectures.items()}
    real = models_ms(models, workload, device=device, repeats=config.repeats, warmup=config.warmup)
    print(f"{'phase':<8} {'real':>10} {'summed':>10} {'off':>6} {'analytic':>10} {'off':>6}   ms, model")
    for name, architecture in architectures.items():
        for phase, samples in real.items():
            seen = median(samples[name])
            totals = [table.model(block.name for block in architecture.blocks) for table in (measured, analytic)]
            sums = [getattr(total, f"{phase}_ms") for total in totals]
            cells = " ".join(f"{value:>10.4f} {value / seen - 1:>+6.0%}" for value in sums)
            print(f"{phase:<8} {seen:>10.4f} {cells}   {name}")


if __name__ == "__main__":
    main()
