"""Stage score_library: parent, library, data -> what every variant of every block, alone, does to the parent.

With a solution as further input: what the variants do to the parent without the subblocks that the solution lacks.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import load_tokenizer, require_same_tokenizer
from distill.distributed import is_main
from launch.artifact import Artifact, require_made_from
from launch.solution import read_solution
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ScoreLibraryStage
from puzzle.assemble import child_architecture
from puzzle.config import ScoreConfig
from puzzle.library import BlockLibrary
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig
from puzzle.model.checkpoint import read_architecture
from puzzle.score import at_depth, score_variants
from puzzle.slices import load_slice
from puzzle.tables import ScoreTable, parse_variant
from puzzle.task_scores import add_task_scores

NUM_NAMED = 3
"""Cheapest removals that the headline names."""


def run(config: ScoreLibraryStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``scores.json``, and ``scores.safetensors`` with the values of every sequence: [rows, sequences]."""
    require_made_from(inputs["library"], "parent", inputs["parent"], what="library")
    parent_dir, settings = inputs["parent"].path, config.scores
    architecture = read_architecture(parent_dir)
    library = BlockLibrary.open(inputs["library"].path)
    library.require_parent(architecture)
    variants: Sequence[Sequence[BlockConfig]] = library.variants
    base: tuple[BlockConfig, ...] | None = None
    if "solution" in inputs:
        base, variants = _at_depth_of(inputs["solution"], inputs["parent"], library, settings)
    library.require_variants(variants)
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, parent_dir, "parent")
    sequences = calibration_sequences(dataset, settings, architecture)
    parent = load_slice(parent_dir, config.engine)

    scores = score_variants(
        parent,
        architecture,
        variants,
        library.tensors,
        sequences,
        batch_size=settings.batch_size,
        base=base,
        iterative_removals=settings.iterative_removals,
        compile=config.engine.compile,
    )
    table = scores.table
    if settings.tasks:
        tokenizer = load_tokenizer(parent_dir)
        table = add_task_scores(table, parent, architecture, variants, library.tensors, tokenizer, settings, base=base)
    if is_main():
        table.write(context.out / "scores.json")
        save_file(scores.per_sequence, context.out / "scores.safetensors")
    return _result(table, scores.removals, architecture)


def calibration_sequences(dataset: TokenDataset, scores: ScoreConfig, parent: Architecture) -> Tensor:
    """Token ids [num_sequences, seq_len] that everything is scored on.

    Raises:
        ValueError: the calibration split is shorter, or ``scores.seq_len`` is beyond the parent's positions.
    """
    require(
        scores.seq_len <= parent.max_positions,
        f"scores.seq_len={scores.seq_len} is beyond the {parent.max_positions} positions of the parent; lower it",
    )
    return dataset.split("calibration").first(scores.num_calibration, scores.seq_len)[scores.skip_sequences :]


def _at_depth_of(
    solution: Artifact, parent: Artifact, library: BlockLibrary, scores: ScoreConfig
) -> tuple[tuple[BlockConfig, ...], tuple[tuple[BlockConfig, ...], ...]]:
    """The base that lacks what the best solution lacks, and the variants that are left."""
    require(
        scores.iterative_removals == 0,
        f"scores.iterative_removals={scores.iterative_removals} beside the input `solution`, which settles what goes; "
        "choose one",
    )
    found = read_solution(solution, parent)
    base, variants = at_depth(
        library.variants, child_architecture(library.parent, found["solutions"][0]["blocks"]).blocks
    )
    library.require_variants([(block,) for block in base])
    return base, variants


def cheapest_removals(scores: ScoreTable, parent: Architecture) -> list[int]:
    """Blocks in rising order of the KLD of removing the attention beside an FFN of the parent's width."""
    klds = {}
    for row in scores.rows:
        own = parent.blocks[row.block]
        attention, ffn = parse_variant(row.variant)
        if attention.is_no_op and not own.attention.is_no_op and ffn == own.ffn:
            klds[row.block] = row.values["kld"]
    return sorted(klds, key=klds.__getitem__)


def _result(scores: ScoreTable, removed: tuple[int, ...], parent: Architecture) -> StageResult:
    removals = [] if scores.base else cheapest_removals(scores, parent)
    means = [statistics.fmean(block.values()) for block in scores.by_block("kld")]
    headline = f"{len(scores.rows)} scores; dearest block {means.index(max(means))}"
    metrics: dict[str, Any] = {
        "num_scores": len(scores.rows),
        "num_tokens": scores.num_tokens,
        "parent_lm_loss": scores.parent["lm_loss"],
        "cheapest_attention_removals": removals,
    }
    if scores.base_values:
        headline += f"; beside a base of KLD {scores.base_values['kld']:.3g}"
        metrics["base_values"] = scores.base_values
    if removed:
        klds = scores.by_block("kld")
        total = sum(klds[index][f"{NO_ATTENTION.name}+{parent.blocks[index].ffn.name}"] for index in removed)
        headline += f"; {len(removed)} attentions removed one after another cost KLD {total:.3g}"
        metrics |= {"iterative_removals": list(removed), "iterative_removal_kld": total}
    elif removals:
        headline += f"; cheapest attention removals: {' '.join(map(str, removals[:NUM_NAMED]))}"
    return StageResult(headline=headline, metrics=metrics)
