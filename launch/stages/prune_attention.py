"""Stage prune_attention: model, data -> the model with its least valuable attentions as no-ops."""

from __future__ import annotations

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import PruneAttentionStage
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.prune_attention import (
    removable_attentions,
    removal_klds,
    remove_attentions,
    score_removals,
    select_removals,
)


def run(config: PruneAttentionStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write the pruned model and the ``scores.json`` that it was chosen by."""
    model_dir, prune = inputs["model"].path, config.prune_attention
    architecture = read_architecture(model_dir)
    removable = removable_attentions(
        architecture, num_attentions=prune.num_attentions, keep_attention=prune.keep_attention
    )
    require(
        prune.seq_len <= architecture.max_positions,
        f"prune_attention.seq_len={prune.seq_len} exceeds the model's {architecture.max_positions} positions; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, model_dir, "model")
    sequences = dataset.split("calibration").first(prune.num_sequences, prune.seq_len)
    model = load_model(model_dir, device=resolve_device(config.engine), dtype=resolve_dtype(config.engine))

    scores = score_removals(
        model,
        architecture,
        removable,
        sequences,
        batch_size=prune.batch_size,
        iterative_removals=prune.num_attentions if prune.iterative else 0,
        compile=config.engine.compile,
    )
    klds = removal_klds(scores.table, architecture)
    removed = scores.removals or select_removals(klds, prune.num_attentions, contiguous=prune.contiguous)
    pruned = remove_attentions(model_dir, architecture, removed, context.out)
    scores.table.write(context.out / "scores.json")
    num_attentions = sum(not block.attention.is_no_op for block in architecture.blocks)
    longest = max((last - first + 1 for first, last in pruned.attention_free_runs()), default=0)
    return StageResult(
        headline=(
            f"{len(removed)} of {num_attentions} attentions removed, cheapest first: blocks "
            f"{' '.join(map(str, removed))}; longest run without attention: {longest}"
        ),
        metrics={
            "removed_blocks": sorted(removed),
            "removal_kld": {str(index): klds[index] for index in sorted(klds)},
            "longest_attention_free_run": longest,
        },
    )
