"""How a pipeline is cut: stages of nearly equal cost, the teacher's beside the student's. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from distill.config import require

BACKWARD_COST = 2
"""Of a backward pass, in forward passes: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Forward cost of a model's parts, in any unit."""

    blocks: Sequence[float]
    head: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Number of consecutive blocks in every pipeline stage."""

    student: tuple[int, ...]
    teacher: tuple[int, ...] = ()
    """Empty: no teacher runs."""

    def first_block(self, stage: int) -> int:
        """Index of the student's first block in ``stage``."""
        return sum(self.student[:stage])


def plan_stages(
    num_stages: int,
    student: ModelCosts,
    teacher: ModelCosts | None = None,
    layer_map: Sequence[int] = (),
    *,
    recompute: bool = False,
) -> StagePlan:
    """Cut student and teacher so that the costliest stage is as cheap as it can be.

    Where hidden states are compared, a stage has the teacher's blocks up to the one that its own last block is paired
    with: both models are cut once, by their common cost. Else each is cut by its own.

    Args:
        num_stages: stages.
        student: its costs; it runs forward and backward.
        teacher: its costs; it runs forward. None: no teacher runs.
        layer_map: teacher block that each student block is paired with, strictly rising to the last one; empty: hidden
            states are not compared.
        recompute: whether the student runs forward twice.

    Raises:
        ValueError: fewer blocks that compute something than stages.
    """
    passes = 1 + BACKWARD_COST + recompute
    trained = [passes * cost for cost in student.blocks]
    if teacher is None:
        return StagePlan(student=balanced(trained, num_stages, last_extra=passes * student.head))
    if not layer_map:
        return StagePlan(
            student=balanced(trained, num_stages, last_extra=passes * student.head),
            teacher=balanced(teacher.blocks, num_stages, last_extra=teacher.head),
        )
    assert len(layer_map) == len(student.blocks)
    assert list(layer_map) == sorted(set(layer_map)), f"{layer_map} does not rise"
    assert layer_map[-1] == len(teacher.blocks) - 1, "the last blocks are paired with each other"
    ends = [block + 1 for block in layer_map]
    taught = [sum(teacher.blocks[start:end]) for start, end in pairwise([0, *ends])]
    together = [own + beside for own, beside in zip(trained, taught, strict=True)]
    counts = balanced(together, num_stages, last_extra=passes * student.head + teacher.head, needed=trained)
    cuts = [0, *(ends[last - 1] for last in accumulate(counts))]
    return StagePlan(student=counts, teacher=tuple(end - start for start, end in pairwise(cuts)))


def balanced(
    costs: Sequence[float], num_parts: int, *, last_extra: float = 0.0, needed: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Lengths of ``num_parts`` runs of ``costs`` whose largest sum is least, by dynamic programming.

    Args:
        costs: in order, none negative.
        num_parts: runs.
        last_extra: added to the last run.
        needed: of each run some of these must be above 0; None: of ``costs``.

    Raises:
        ValueError: there are fewer costs above 0 than runs.
    """
    needed = costs if needed is None else needed
    real = sum(cost > 0 for cost in needed)
    require(
        num_parts <= real,
        f"engine.pipeline_parallel={num_parts} is more than the {real} blocks with attention or FFN; set it to at most "
        f"{real}",
    )
    sums, need = [0.0, *accumulate(costs)], [0.0, *accumulate(needed)]
    # worst[end]: least possible largest sum of the first `end` costs in as many runs as were added; start of the last.
    worst = [0.0] + [math.inf] * len(costs)
    starts: list[list[int]] = []
    for part in range(num_parts):
        extra = last_extra if part == num_parts - 1 else 0.0
        found = [math.inf] * (len(costs) + 1)
        start_of = [0] * (len(costs) + 1)
        for end in range(1, len(costs) + 1):
            for start in range(end):
                largest = max(worst[start], sums[end] - sums[start] + extra)
                if need[end] > need[start] and largest < found[end]:
                    found[end], start_of[end] = largest, start
        worst = found
        starts.append(start_of)
    lengths, end = [], len(costs)
    for start_of in reversed(starts):
        lengths.append(end - start_of[end])
        end = start_of[end]
    return tuple(reversed(lengths))
