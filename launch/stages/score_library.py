"""Stage score_library: parent, library, data -> what every variant of every block, alone, does to the parent."""

from __future__ import annotations

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from launch.artifact import require_made_from
from launch.registry import ScoreLibraryStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.library import BlockLibrary
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.score import score_variants
from puzzle.space import block_variants
from puzzle.tables import ScoreTable, parse_variant

NUM_NAMED = 3
"""Cheapest removals that the headline names."""


def run(config: ScoreLibraryStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``scores.json``."""
    require_made_from(inputs["library"], "parent", inputs["parent"], what="library")
    parent_dir, seq_len = inputs["parent"].path, config.scores.seq_len
    architecture = read_architecture(parent_dir)
    library = BlockLibrary.open(inputs["library"].path)
    variants = [block_variants(architecture, index, config.space) for index in range(architecture.num_blocks)]
    library.require_variants(variants)
    require(
        seq_len <= architecture.max_positions,
        f"scores.seq_len={seq_len} is beyond the {architecture.max_positions} positions of the parent; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, parent_dir, "parent")
    sequences = dataset.split("calibration").first(config.scores.num_sequences, seq_len)
    parent = load_model(parent_dir, device=resolve_device(config.engine), dtype=resolve_dtype(config.engine))

    scores = score_variants(
        parent, architecture, variants, library.tensors, sequences, batch_size=config.scores.batch_size
    )
    scores.write(context.out / "scores.json")
    removals = cheapest_removals(scores, architecture)
    return StageResult(
        headline=_headline(scores, removals),
        metrics={
            "num_scores": len(scores.rows),
            "num_tokens": scores.num_tokens,
            "parent_lm_loss": scores.parent["lm_loss"],
            "cheapest_attention_removals": removals,
        },
    )


def cheapest_removals(scores: ScoreTable, parent: Architecture) -> list[int]:
    """Blocks in rising order of the KLD of removing the attention beside an FFN of the parent's width."""
    klds = {}
    for row in scores.rows:
        own = parent.blocks[row.block]
        attention, ffn = parse_variant(row.variant)
        if attention.is_no_op and not own.attention.is_no_op and ffn == own.ffn:
            klds[row.block] = row.kld
    return sorted(klds, key=klds.__getitem__)


def _headline(scores: ScoreTable, removals: list[int]) -> str:
    dearest = max(range(scores.num_blocks), key=[_mean(block) for block in scores.by_block("kld")].__getitem__)
    text = f"{len(scores.rows)} scores; dearest block {dearest}"
    return f"{text}; cheapest attention removals: {' '.join(map(str, removals[:NUM_NAMED]))}" if removals else text


def _mean(klds: dict[str, float]) -> float:
    return sum(klds.values()) / len(klds)
