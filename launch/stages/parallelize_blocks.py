"""Stage parallelize_blocks: model -> the model with windows of blocks that run in parallel (FFN Fusion, Appendix B)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distill.config import require
from fusion.block_parallel import Window, choose_windows, parallel_architecture, parallelize_checkpoint
from fusion.dependency import JSON_NAME as DEPENDENCY_NAME
from launch.artifact import require_made_from
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ParallelizeBlocksStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import copy_tokenizer, has_tokenizer, read_architecture

PARALLEL_NAME = "parallel.json"


def run(config: ParallelizeBlocksStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Choose the windows and write the model with them; ``parallel.json`` beside it names them in order of choice."""
    model_dir, matrix = inputs["model"].path, None
    require(has_tokenizer(model_dir), f"{model_dir} has no tokenizer, and the result needs one; make it anew")
    if "dependency" in inputs:
        require_made_from(inputs["dependency"], "model", inputs["model"], what="dependency matrix")
        matrix = json.loads((inputs["dependency"].path / DEPENDENCY_NAME).read_text())["matrix"]
    sequential = read_architecture(model_dir)
    windows = choose_windows(sequential, config.parallelize, matrix)
    parallel = parallel_architecture(sequential, windows)

    parallelize_checkpoint(model_dir, context.out, parallel)
    copy_tokenizer(model_dir, context.out)
    content = _content(windows)
    (context.out / PARALLEL_NAME).write_text(json.dumps(content, indent=1) + "\n")
    return StageResult(
        headline=_headline(parallel, windows, content["max"]),
        metrics={"num_blocks": parallel.num_blocks, "depth": parallel.depth, **content},
    )


def _content(windows: Sequence[Window]) -> dict[str, Any]:
    """Windows, the largest dependency within any of them and the sum of all; null where nothing was measured."""
    records = [
        {"first": window.first, "last": window.last, "max": window.largest, "sum": window.total} for window in windows
    ]
    largest = [window.largest for window in windows if window.largest is not None]
    totals = [window.total for window in windows if window.total is not None]
    return {"windows": records, "max": max(largest, default=None), "sum": sum(totals) if totals else None}


def _headline(parallel: Architecture, windows: Sequence[Window], largest: float | None) -> str:
    names = ", ".join(f"{window.first}-{window.last}" for window in windows)
    dependency = f" (dependency up to {largest:.2g})" if largest is not None else ""
    kept = len(parallel.parallel_windows) - len(windows)
    before = f" besides {kept} that the model had" if kept else ""
    return (
        f"blocks {names} run in parallel{dependency}{before}; "
        f"{parallel.num_blocks} blocks in {parallel.depth} steps one after another"
    )
