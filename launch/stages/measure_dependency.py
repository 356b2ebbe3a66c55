"""Stage measure_dependency: model, data -> how much every block needs every earlier one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.distributed import is_main
from fusion.dependency import Dependency, measure_dependency
from fusion.grouping import largest_dependency
from launch.canvas import stand_alone
from launch.figures import dependency_matrix, direction_change
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import MeasureDependencyStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture
from puzzle.slices import load_slice

MATRIX_FIGURE = "dependency.svg"
CONTRIBUTIONS_FIGURE = "contributions.svg"


def run(config: MeasureDependencyStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``dependency.json``, ``dependency.npy`` and their pictures ``dependency.svg`` and ``contributions.svg``.

    In fp32 whatever the engine: the distances are small.
    """
    model_dir, settings = inputs["model"].path, config.dependency
    architecture = read_architecture(model_dir)
    require(
        settings.seq_len <= architecture.max_positions,
        f"dependency.seq_len={settings.seq_len} is beyond the {architecture.max_positions} positions of the model; "
        "lower it",
    )
    num_active = sum(not block.is_dummy for block in architecture.blocks)
    require(
        num_active >= 2,
        f"the model has {architecture.num_blocks} blocks, {num_active} of them with attention or FFN; a dependency is "
        "between two of those, so give a model that has them",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, model_dir, "model")
    sequences = dataset.split("calibration").first(settings.num_sequences, settings.seq_len)
    parent = load_slice(model_dir, replace(config.engine, precision="fp32"))

    dependency = measure_dependency(
        parent,
        sequences,
        batch_size=settings.batch_size,
        average=settings.average,
        compile=config.engine.compile,
    )
    if is_main():
        dependency.save(context.out)
        _draw(dependency, architecture, context.out)
    median = dependency.matrix.nanmedian().item()
    runs = _runs(architecture, dependency)
    return StageResult(
        headline=_headline(runs, median),
        metrics={"num_tokens": dependency.num_tokens, "median_dependency": median, "attention_free_runs": runs},
    )


def _draw(dependency: Dependency, architecture: Architecture, directory: Path) -> None:
    attention_free = [block.is_attention_free for block in architecture.blocks]
    figures = {
        MATRIX_FIGURE: dependency_matrix(dependency.rows(), attention_free),
        CONTRIBUTIONS_FIGURE: direction_change(
            dependency.direction_change.tolist(), dependency.contribution_ratio.tolist(), attention_free
        ),
    }
    for name, svg in figures.items():
        (directory / name).write_text(stand_alone(svg) + "\n", encoding="utf-8")


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
