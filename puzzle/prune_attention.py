"""Attention pruning: the least valuable attentions become no-ops. The short road to fusion, without library or search.

FFN Fusion starts from a model whose attentions a Puzzle search has removed in places; here each attention is scored by
removing it, alone or beside those that are gone already, and the cheapest go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from distill.config import require
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig, require_sequential
from puzzle.model.checkpoint import TensorReader, copy_checkpoint, copy_tokenizer
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.score import Scores, score_variants
from puzzle.slices import ParentSlice
from puzzle.space import block_indices
from puzzle.tables import ScoreTable


def removable_attentions(
    architecture: Architecture, *, num_attentions: int, keep_attention: Iterable[int | str]
) -> tuple[int, ...]:
    """Blocks whose attention may be removed.

    Args:
        architecture: of the model.
        num_attentions: how many are to go.
        keep_attention: blocks whose attention stays, in the notation of :func:`puzzle.space.block_indices`.

    Raises:
        ValueError: fewer than ``num_attentions``, ``keep_attention`` names no blocks, or some blocks run in parallel.
    """
    require_sequential(architecture.parallel_windows, "prune_attention")
    keep_attention = tuple(keep_attention)
    kept = block_indices(keep_attention, architecture.num_blocks, name="prune_attention.keep_attention")
    removable = tuple(
        index for index, block in enumerate(architecture.blocks) if index not in kept and not block.attention.is_no_op
    )
    require(
        num_attentions <= len(removable),
        f"prune_attention.num_attentions={num_attentions}, but only {len(removable)} attentions can be removed "
        f"(keep_attention={list(keep_attention)} of {architecture.num_blocks} blocks); ask for fewer",
    )
    return removable


def score_removals(
    model: DeciLMForCausalLM,
    architecture: Architecture,
    removable: tuple[int, ...],
    sequences: Tensor,
    *,
    batch_size: int,
    iterative_removals: int = 0,
    compile: bool = False,
) -> Scores:
    """Replace-1-block scores of every removal, the FFN left as it is, beside the zero rows of the model itself.

    Arguments are those of :func:`puzzle.score.score_variants`.
    """
    variants: list[tuple[BlockConfig, ...]] = [(block,) for block in architecture.blocks]
    for index in removable:
        variants[index] += (replace(architecture.blocks[index], attention=NO_ATTENTION),)
    return score_variants(
        ParentSlice.whole(model),
        architecture,
        variants,
        _nothing_replaced,
        sequences,
        batch_size=batch_size,
        iterative_removals=iterative_removals,
        compile=compile,
    )


def removal_klds(scores: ScoreTable, architecture: Architecture) -> dict[int, float]:
    """KLD of every scored removal by block, in nats per token."""
    return {row.block: row.values["kld"] for row in scores.rows if row.variant != architecture.blocks[row.block].name}


def select_removals(klds: Mapping[int, float], num_attentions: int, *, contiguous: bool) -> tuple[int, ...]:
    """Blocks that lose their attention, the cheapest first.

    Args:
        klds: score of every removable attention by block.
        num_attentions: how many go.
        contiguous: take neighbours, the run whose summed score is lowest. Blocks that have no attention any more do
            not interrupt a run.
    """
    chosen = sorted(klds, key=klds.__getitem__)[:num_attentions]
    if contiguous:
        blocks = sorted(klds)
        runs = [blocks[start : start + num_attentions] for start in range(len(blocks) - num_attentions + 1)]
        chosen = min(runs, key=lambda run: sum(klds[index] for index in run))
    return tuple(sorted(chosen, key=klds.__getitem__))


def remove_attentions(model_dir: Path, architecture: Architecture, removed: tuple[int, ...], out: Path) -> Architecture:
    """Write the model without the attentions, and their norms, of blocks ``removed``; returns its architecture."""
    pruned = architecture
    for index in removed:
        pruned = pruned.with_block(index, replace(architecture.blocks[index], attention=NO_ATTENTION))
    with TensorReader(model_dir) as reader:
        copy_checkpoint(reader, out, pruned)
    copy_tokenizer(model_dir, out)
    return pruned


def _nothing_replaced(_: int, __: BlockConfig) -> dict[str, Tensor]:
    return {}
