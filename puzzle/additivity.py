"""Additivity: whether the sum of replace-1-block scores is what a child that makes all the replacements really loses.

The search adds scores up as if replacements did not touch one another (Puzzle, section 4.2). Here children are realised
in memory, on the tokens that the scores were measured on, and both numbers stand side by side.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from puzzle.assemble import child_architecture
from puzzle.model.architecture import Architecture
from puzzle.replacement_runs import ReplacedTensors, ReplacementRuns
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreTable

MIN_CHILDREN = 3
"""Fewer have no rank correlation to speak of."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """A choice of one variant per block."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RealisedChild:
    """One row of ``additivity.json``."""

    name: str
    blocks: tuple[str, ...]
    num_replaced: int
    """Blocks that are not the parent's."""
    sum_of_scores: float
    """Of kld, in nats per token."""
    realised_kld: float
    """KL(parent || child) in nats per token."""
    realised_lm_loss_difference: float
    """Next-token loss less the parent's, in nats."""


def search_children(found: Mapping[str, Any]) -> list[Child]:
    """The solutions and the Pareto front of a ``solution.json``, each choice once."""
    children = [Child(name=f"solution {i}", blocks=tuple(row["blocks"])) for i, row in enumerate(found["solutions"])]
    children += [Child(name=f"pareto {i}", blocks=tuple(row["blocks"])) for i, row in enumerate(found["pareto"])]
    return _distinct(children)


def random_children(scores: ScoreTable, parent: Architecture, number: int, *, seed: int) -> list[Child]:
    """Children with randomly chosen variants at randomly chosen blocks; the number of blocks rises from one to all.

    They start from the scores' base, and take any of the variants that are scored there. Fewer than ``number`` where
    there are no more.
    """
    start = scores.base or tuple(block.name for block in parent.blocks)
    others = [
        (index, [variant for variant in at_block if variant != start[index]])
        for index, at_block in enumerate(scores.by_block("kld"))
    ]
    free = [(index, variants) for index, variants in others if variants]
    if not free:
        return []
    generator = random.Random(seed)
    children = []
    for position in range(number):
        size = 1 + round((len(free) - 1) * position / max(1, number - 1))
        blocks = list(start)
        for index, variants in generator.sample(free, size):
            blocks[index] = generator.choice(variants)
        children.append(Child(name=f"random {position}", blocks=tuple(blocks)))
    return _distinct(children)


def sum_of_scores(scores: ScoreTable, blocks: Sequence[str], metric: str = "kld") -> float:
    """What the scores promise for a child; from the parent, whatever base they are conditional on.

    Raises:
        ValueError: a block's variant has no score.
    """
    total = (scores.base_values or {}).get(metric, 0.0)
    for index, (variant, values) in enumerate(zip(blocks, scores.by_block(metric), strict=True)):
        require(
            variant in values,
            f"block {index} of the child is {variant}, which has no score; the scores have {', '.join(values)}",
        )
        total += values[variant]
    return total


def realise(
    parent: ParentSlice,
    architecture: Architecture,
    children: Sequence[Child],
    scores: ScoreTable,
    replaced_tensors: ReplacedTensors,
    sequences: Tensor,
    *,
    batch_size: int,
    compile: bool = False,
) -> list[RealisedChild]:
    """Run every child beside the parent. Arguments are those of :func:`puzzle.score.score_variants`.

    Raises:
        ValueError: a child has a variant without a score.
    """
    promised = [sum_of_scores(scores, child.blocks) for child in children]
    own = tuple(block.name for block in architecture.blocks)
    runs = ReplacementRuns(parent, architecture, replaced_tensors, sequences, batch_size=batch_size, compile=compile)
    rows = []
    for child, total in zip(tqdm(children, desc="realise", unit="child", leave=False), promised, strict=True):
        values = runs.rebase(child_architecture(architecture, child.blocks).blocks)
        lm_loss = values["lm_loss"] - runs.parent_values["lm_loss"]
        rows.append(
            RealisedChild(
                name=child.name,
                blocks=child.blocks,
                num_replaced=sum(block != mine for block, mine in zip(child.blocks, own, strict=True)),
                sum_of_scores=total,
                realised_kld=values["kld"].mean().item(),
                realised_lm_loss_difference=lm_loss.mean().item(),
            )
        )
    return rows


def rank_correlation(rows: Sequence[RealisedChild]) -> float | None:
    """Spearman's, between sum of scores and realised KLD; None where there is none to speak of."""
    sums, realised = [row.sum_of_scores for row in rows], [row.realised_kld for row in rows]
    if len(rows) < MIN_CHILDREN or len(set(sums)) == 1 or len(set(realised)) == 1:
        return None
    return float(spearmanr(sums, realised).statistic)


def median_ratio(rows: Sequence[RealisedChild]) -> float | None:
    """Median of sum of scores over realised KLD, of children that differ from the parent; None without any."""
    ratios = [row.sum_of_scores / row.realised_kld for row in rows if row.num_replaced > 0 and row.realised_kld > 0]
    return statistics.median(ratios) if ratios else None


def _distinct(children: Iterable[Child]) -> list[Child]:
    """The first of every choice."""
    found: dict[tuple[str, ...], Child] = {}
    for child in children:
        found.setdefault(child.blocks, child)
    return list(found.values())
