"""Stage benchmark: latency, throughput and memory of whole models against the parent, measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from distill.config import require
from distill.engine.base import resolve_device
from launch.externals import hardware
from launch.quantities import num_bytes, serving
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import BenchmarkStage
from puzzle.config import WorkloadConfig
from puzzle.latency import (
    cpu_threads,
    models_ms,
    peak_memory_bytes,
    require_memory,
    require_positions,
    speed,
    torch_dtype,
)
from puzzle.model import stats
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture

NOISY_SPREAD = 0.25
"""Spread of the rounds beyond which the headline warns."""


def run(config: BenchmarkStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``benchmark.json``: all models in one process, timed in turns."""
    workload, benchmark, device = config.workload, config.benchmark, resolve_device(config.engine)
    require(
        workload.tensor_parallel == 1,
        f"workload.tensor_parallel={workload.tensor_parallel}: the benchmark runs whole models on one device; set "
        "workload.tensor_parallel=1",
    )
    names = ["parent", *(name for name in inputs if name != "parent")]
    architectures = {name: read_architecture(inputs[name].path) for name in names}
    memory = {name: _memory(architecture, workload) for name, architecture in architectures.items()}
    for name, architecture in architectures.items():
        require_positions(workload, architecture, name)
    require_memory(sum(row["weight_bytes"] for row in memory.values()), device)

    with cpu_threads(workload.num_cpu_threads):
        num_threads = torch.get_num_threads()
        models = {n: load_model(inputs[n].path, device=device, dtype=torch_dtype(workload)) for n in names}
        peaks = {n: peak_memory_bytes(m, workload) if device.type == "cuda" else None for n, m in models.items()}
        rounds = models_ms(models, workload, device=device, repeats=benchmark.repeats, warmup=benchmark.warmup)
    rows: dict[str, dict[str, Any]] = {
        name: {**speed(name, rounds, workload), **memory[name], "peak_memory_bytes": peaks[name]} for name in names
    }
    report = {
        "workload": asdict(workload),
        "hardware": hardware(config)["device"],
        "cpu_threads": num_threads if device.type == "cpu" else None,
        "models": rows,
        "rounds_ms": rounds,
    }
    (context.out / "benchmark.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return StageResult(headline=_headline(rows, workload), metrics={"models": rows, "workload": asdict(workload)})


def _memory(architecture: Architecture, workload: WorkloadConfig) -> dict[str, int]:
    """Bytes of the weights, of the KV cache per token and sequence, and of both at the workload's batch and length."""
    size = workload.bytes_per_value
    weight_bytes, per_token = stats.weight_bytes(architecture, size), stats.kv_bytes_per_token(architecture, size)
    num_cached = workload.batch_size * min(
        workload.max_context_tokens, architecture.sliding_window or workload.max_context_tokens
    )
    return {
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": per_token,
        "memory_bytes": weight_bytes + num_cached * per_token,
    }


def _headline(rows: Mapping[str, Mapping[str, Any]], workload: WorkloadConfig) -> str:
    parts = []
    for phase in ("decode", "prefill"):
        parent = f"{phase} {rows['parent'][f'{phase}_ms']:.3g} ms parent"
        ratios = [f"{name} {row[f'{phase}_vs_parent']:.2f}x" for name, row in rows.items() if name != "parent"]
        parts.append(", ".join([parent, *ratios]))
    parts.append(f"{num_bytes(rows['parent']['memory_bytes'])} parent")
    parts.append(serving(asdict(workload)))
    worst = max(row[f"{phase}_spread"] for row in rows.values() for phase in ("decode", "prefill"))
    if worst > NOISY_SPREAD:
        parts.append(f"noisy: rounds spread by {worst:.0%}, repeat on an idle machine")
    return "; ".join(parts)
