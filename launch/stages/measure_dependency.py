"""Stage measure_dependency: model, data -> how much every block needs every earlier one."""

from __future__ import annotations

from typing import Any

import torch

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device
from fusion.dependency import Dependency, measure_dependency
from fusion.grouping import largest_dependency
from launch.registry import MeasureDependencyStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture


def run(config: MeasureDependencyStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``dependency.json`` and ``dependency.npy``. In fp32 whatever the engine: the distances are small."""
    model_dir = inputs["model"].path
    architecture = read_architecture(model_dir)
    seq_len = config.dependency.seq_len
    require(
        seq_len <= architecture.max_positions,
        f"dependency.seq_len={seq_len} is beyond the {architecture.max_positions} positions of the model; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, model_dir, "model")
    sequences = dataset.split("calibration").first(config.dependency.num_sequences, seq_len)
    model = load_model(model_dir, device=resolve_device(config.engine), dtype=torch.float32)

    dependency = measure_dependency(model, sequences, batch_size=config.dependency.batch_size)
    dependency.save(context.out)
    median = dependency.matrix.nanmedian().item()
    runs = _runs(architecture, dependency)
    return StageResult(
        headline=_headline(runs, median),
        metrics={"num_tokens": dependency.num_tokens, "median_dependency": median, "attention_free_runs": runs},
    )


def _runs(architecture: Architecture, dependency: Dependency) -> list[dict[str, Any]]:
    """Attention-free runs of two blocks or more, the least dependent first."""
    rows = dependency.rows()
    runs = [
        {"first": first, "last": last, "largest_dependency": largest_dependency(rows, (first, last))}
        for first, last in architecture.attention_free_runs()
        if first < last
    ]
    return sorted(runs, key=lambda run: run["largest_dependency"])


def _headline(runs: list[dict[str, Any]], median: float) -> str:
    if not runs:
        return f"median dependency {median:.3g}; no two neighbouring blocks without attention, so nothing to fuse yet"
    first, last, largest = (runs[0][name] for name in ("first", "last", "largest_dependency"))
    return f"dependency at most {largest:.3g} within attention-free blocks {first}-{last}; median of all {median:.3g}"
