"""Replace-1-block scores: what one variant at one block, alone, does to a model (Puzzle, section 4.2).

The model is the parent, or a base that lacks some of its subblocks. Divergences are always from the parent, and every
score is the difference to what the base has already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from distill.config import require
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig
from puzzle.replacement_runs import ReplacedTensors, ReplacementRuns, Values
from puzzle.score_metrics import METRICS
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreRow, ScoreTable


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A table of scores, the same on every process."""

    table: ScoreTable
    per_sequence: Values
    """What the values of the table are means of: [rows, sequences] by metric."""
    removals: tuple[int, ...] = ()
    """Blocks whose attention went one after another, in that order."""


def score_variants(
    parent: ParentSlice,
    architecture: Architecture,
    variants: Sequence[Sequence[BlockConfig]],
    replaced_tensors: ReplacedTensors,
    sequences: Tensor,
    *,
    batch_size: int,
    base: Sequence[BlockConfig] | None = None,
    iterative_removals: int = 0,
    compile: bool = False,
) -> Scores:
    """Score every variant of every block; the base's own block is zero without being run.

    All rows see the same tokens, and all values are means over the tokens that have a next one. Differences between
    rows are therefore much more certain than a standard error suggests, which is over sequences.

    Args:
        parent: in the data type to score in; matrix products run in it, all else in fp32.
        architecture: of the whole parent.
        variants: candidates for each block.
        replaced_tensors: tensors of a variant; subblocks that it leaves out are the parent's.
        sequences: token ids [num_sequences, seq], the same on every process. Replicas share them.
        batch_size: sequences per forward; a variant's sequences count once for each variant in it.
        base: the model whose blocks are replaced, one by one; None: the parent.
        iterative_removals: attentions that go one after another, that of the least KLD first, each scored beside those
            that are gone. What a removal costs more (or less) beside them is added to every variant without attention
            of its block. Those that stay have the score of the last round.
        compile: run the blocks and the metrics through torch.compile. Compiles the blocks of ``parent`` in place.

    Raises:
        ValueError: fewer than two sequences, which have no standard error, or fewer removals than are asked for.
    """
    require(len(sequences) >= 2, f"scores need num_sequences >= 2 for their standard error, got {len(sequences)}")
    base = tuple(architecture.blocks if base is None else base)
    rows = [(index, variant) for index, at_block in enumerate(variants) for variant in at_block]
    removal = _IterativeRemoval(base, rows, iterative_removals)
    runs = ReplacementRuns(parent, architecture, replaced_tensors, sequences, batch_size=batch_size, compile=compile)
    own = runs.parent_values
    start = own if base == architecture.blocks else runs.rebase(base)
    values = runs.measure_variants(variants, start)
    scores = {name: values[name] - start[name] for name in METRICS}
    removals = removal.run(runs, scores, start) if iterative_removals > 0 else ()
    away = {name: (start[name] - own[name]).mean().item() for name in METRICS}
    table = ScoreTable(
        parent={"lm_loss": own["lm_loss"].mean().item()},
        num_tokens=sequences.numel(),
        rows=tuple(_row(index, variant, scores, row) for row, (index, variant) in enumerate(rows)),
        base=None if base == architecture.blocks else tuple(block.name for block in base),
        base_values=None if base == architecture.blocks else away,
    )
    return Scores(table=table, per_sequence=scores, removals=removals)


def _row(index: int, variant: BlockConfig, scores: Values, row: int) -> ScoreRow:
    own = {name: values[row] for name, values in scores.items()}
    return ScoreRow(
        block=index,
        variant=variant.name,
        values={name: values.mean().item() for name, values in own.items()},
        stderr={name: values.std().item() / math.sqrt(len(values)) for name, values in own.items()},
    )


class _IterativeRemoval:
    """Attentions that go one after another, and what scores become beside those that are gone."""

    def __init__(self, base: Sequence[BlockConfig], rows: Sequence[tuple[int, BlockConfig]], num_removals: int) -> None:
        self._base = list(base)
        self._rows = rows
        self._num_removals = num_removals
        self._row_of = {
            index: row
            for row, (index, variant) in enumerate(rows)
            if variant == replace(base[index], attention=NO_ATTENTION) != base[index]
        }
        """Row of every removal beside the base's own FFN, by block."""
        require(
            num_removals <= len(self._row_of),
            f"iterative removal of {num_removals} attentions, but only {len(self._row_of)} blocks have a variant that "
            "lacks nothing but the attention; ask for fewer, or score a library whose space has such variants",
        )

    def run(self, runs: ReplacementRuns, scores: Values, at_base: Values) -> tuple[int, ...]:
        """Corrects ``scores`` in place; returns the blocks in the order of their removal."""
        # In the first round nothing is gone yet: its increments are the scores that are there.
        increments = {index: {name: scores[name][row] for name in METRICS} for index, row in self._row_of.items()}
        left = list(self._row_of)
        removed: list[int] = []
        while len(removed) < self._num_removals:
            if removed:
                increments |= self._measure(runs, left, at_base)
            cheapest = min(left, key=lambda index: increments[index]["kld"].mean().item())
            left.remove(cheapest)
            removed.append(cheapest)
            self._base[cheapest] = self._removal(cheapest)
            at_base = {name: at_base[name] + increments[cheapest][name] for name in METRICS}
        self._correct(scores, increments)
        return tuple(removed)

    def _removal(self, index: int) -> BlockConfig:
        return self._rows[self._row_of[index]][1]

    def _measure(self, runs: ReplacementRuns, left: Sequence[int], at_base: Values) -> dict[int, dict[str, Tensor]]:
        """What each of ``left`` adds to the values of the base that is reached, which add up exactly: what was measured
        of the last removal stands."""
        candidates = [[self._removal(index)] if index in left else [] for index in range(len(self._base))]
        runs.rebase(self._base)
        measured = runs.measure_variants(candidates, at_base)
        return {
            index: {name: measured[name][row] - at_base[name][0] for name in METRICS} for row, index in enumerate(left)
        }

    def _correct(self, scores: Values, increments: Mapping[int, Mapping[str, Tensor]]) -> None:
        for name in METRICS:
            further = {index: increments[index][name] - scores[name][row] for index, row in self._row_of.items()}
            for row, (index, variant) in enumerate(self._rows):
                if index in further and variant.attention.is_no_op:
                    scores[name][row] += further[index]


def at_depth(
    variants: Sequence[Sequence[BlockConfig]], chosen: Sequence[BlockConfig]
) -> tuple[tuple[BlockConfig, ...], tuple[tuple[BlockConfig, ...], ...]]:
    """What is left to choose once it is settled which attentions and FFNs go.

    Args:
        variants: by block, the parent's own first.
        chosen: blocks of a model that lacks what is to go.

    Returns:
        The parent without the attentions and FFNs that ``chosen`` lacks (``chosen``'s block where no variant lacks just
        those), and the variants of every block that lack the same, which the base's own is one of.
    """
    base, left = [], []
    for at_block, block in zip(variants, chosen, strict=True):
        same = [variant for variant in at_block if _lacks(variant) == _lacks(block)]
        kept = (variant for variant in same if _keeps_rest(variant, at_block[0]))
        base.append(next(kept, block))
        left.append(tuple(same))
    return tuple(base), tuple(left)


def _lacks(block: BlockConfig) -> tuple[bool, bool]:
    return block.attention.is_no_op, block.ffn.is_no_op


def _keeps_rest(variant: BlockConfig, own: BlockConfig) -> bool:
    """Whether what ``variant`` does not lack has the parent's shape."""
    return (variant.attention.is_no_op or variant.attention == own.attention) and (
        variant.ffn.is_no_op or variant.ffn == own.ffn
    )
