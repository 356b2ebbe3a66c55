"""Stage fuse: model -> model whose runs of attention-free FFNs are wide FFNs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fusion.dependency import JSON_NAME as DEPENDENCY_NAME
from fusion.fuse import fuse_checkpoint
from fusion.grouping import Matrix, format_groups, fusion_groups, largest_dependency
from fusion.verify import GroupErrors, verify_fusion
from launch.artifact import require_made_from
from launch.registry import FuseStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import copy_tokenizer, read_architecture

FUSION_NAME = "fusion.json"


def run(config: FuseStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Choose the groups, fuse them and verify every fused FFN; ``fusion.json`` beside the model says what was done."""
    model_dir = inputs["model"].path
    norm = config.fuse.norm
    matrix = None
    if "dependency" in inputs:
        require_made_from(inputs["dependency"], "model", inputs["model"], what="dependency matrix")
        matrix = json.loads((inputs["dependency"].path / DEPENDENCY_NAME).read_text())["matrix"]
    unfused = read_architecture(model_dir)
    groups = fusion_groups(unfused, config.fuse, matrix)

    copy_tokenizer(model_dir, context.out)
    fused = fuse_checkpoint(model_dir, context.out, groups, norm)
    errors = verify_fusion(model_dir, context.out, groups, norm)

    worst = {
        name: max(getattr(error, name) for error in errors)
        for name in ("max_relative_error_fp32", "max_relative_error_fp64")
    }
    records = [_record(fused, error, matrix) for error in errors]
    content = {"groups": records, "norm": norm, "verify": {**worst, "groups": [asdict(error) for error in errors]}}
    (context.out / FUSION_NAME).write_text(json.dumps(content, indent=1) + "\n")
    return StageResult(
        headline=_headline(unfused, fused, errors, records),
        metrics={
            "num_blocks_before": unfused.num_blocks,
            "num_blocks": fused.num_blocks,
            "num_fused_ffns": len(groups),
            "groups": records,
            **worst,
        },
    )


def _record(fused: Architecture, group: GroupErrors, matrix: Matrix | None) -> dict[str, Any]:
    block = fused.blocks[group.block]
    return {
        "first": group.first,
        "last": group.last,
        "parent_block_indices": list(block.parent_block_indices),
        "ffn_dim": block.ffn.ffn_dim,
        "largest_dependency": largest_dependency(matrix, (group.first, group.last)) if matrix else None,
    }


def _headline(
    unfused: Architecture, fused: Architecture, errors: tuple[GroupErrors, ...], records: Sequence[Mapping[str, Any]]
) -> str:
    num_members = sum(error.last - error.first + 1 for error in errors)
    members = format_groups([(error.first, error.last) for error in errors])
    widths = sorted({fused.blocks[error.block].ffn.ffn_dim or 0 for error in errors}, reverse=True)
    worst = max(error.max_relative_error_fp32 for error in errors)
    dependencies = [record["largest_dependency"] for record in records if record["largest_dependency"] is not None]
    dependency = f", dependency up to {max(dependencies):.2g}" if dependencies else ""
    return (
        f"{num_members} FFNs -> {len(errors)} fused (blocks {members}{dependency}), "
        f"width {' and '.join(map(str, widths))}; {unfused.num_blocks} -> {fused.num_blocks} blocks; "
        f"equal to the parallel sum to {worst:.0e}"
    )
