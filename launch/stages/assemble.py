"""Stage assemble: parent, library, solution -> the child as a model."""

from __future__ import annotations

from distill.config import require
from launch.artifact import require_made_from
from launch.solution import read_solution
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import AssembleStage
from puzzle.assemble import assemble
from puzzle.library import BlockLibrary
from puzzle.model.checkpoint import read_architecture
from puzzle.model.stats import num_params


def run(config: AssembleStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write the child of one solution."""
    require_made_from(inputs["library"], "parent", inputs["parent"], what="library")
    found = read_solution(inputs["solution"], inputs["parent"])
    index, solutions = config.assemble.solution, found["solutions"]
    require(
        index < len(solutions),
        f"assemble.solution={index}, but the search found {len(solutions)}; lower it, or raise search.num_solutions",
    )
    parent_dir = inputs["parent"].path
    parent = read_architecture(parent_dir)
    child = assemble(parent_dir, BlockLibrary.open(inputs["library"].path), solutions[index]["blocks"], context.out)
    num_changed = sum(own != new for own, new in zip(parent.blocks, child.blocks, strict=True))
    num_attention_free = sum(block.attention.is_no_op for block in child.blocks)
    before, after = num_params(parent), num_params(child)
    return StageResult(
        headline=(
            f"{num_changed} of {child.num_blocks} blocks replaced, {num_attention_free} without attention; "
            f"{before / 1e6:,.1f}M -> {after / 1e6:,.1f}M parameters"
        ),
        metrics={
            "blocks": [block.name for block in child.blocks],
            "num_changed_blocks": num_changed,
            "num_attention_free_blocks": num_attention_free,
            "params": after,
            "params_frac": after / before,
        },
    )
