"""Where a pipeline is cut. No process and no torch.distributed is needed."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from distill.engine.megatron_stages import ModelCosts, balanced, plan_stages


def _largest(costs: list[float], lengths: tuple[int, ...], last_extra: float) -> float:
    sums, start = [], 0
    for length in lengths:
        sums.append(sum(costs[start : start + length]))
        start += length
    sums[-1] += last_extra
    return max(sums)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice((0, draw.randint(1, 50))) for _ in range(draw.randint(4, 9))] + [1, 1]
    num_parts = draw.randint(1, sum(cost > 0 for cost in costs))
    last_extra = draw.choice((0, 40))
    lengths = balanced(costs, num_parts, last_extra=last_extra)
    assert sum(lengths) == len(costs)
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_parts - 1)]
    possible = [
        tuple(b - a for a, b in pairwise(cut)) for cut in cuts if all(any(costs[a:b]) for a, b in pairwise(cut))
    ]
    assert lengths in possible
    assert _largest(costs, lengths, last_extra) == min(_largest(costs, other, last_extra) for other in possible)


def test_stages_are_cut_by_cost_not_by_number() -> None:
    costs = ModelCosts(blocks=[10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], head=0)
    assert plan_stages(2, costs).student == (1, 10)
    assert plan_stages(2, ModelCosts(blocks=costs.blocks, head=8)).student == (5, 6)


def test_a_stage_has_the_teachers_blocks_that_its_own_are_compared_with() -> None:
    student = ModelCosts(blocks=[4, 0, 6, 4, 4], head=2)
    teacher = ModelCosts(blocks=[5, 5, 5, 5, 5, 5], head=2)
    layer_map = (0, 1, 3, 4, 5)
    plan = plan_stages(2, student, teacher, layer_map)
    assert sum(plan.student) == 5
    assert plan.teacher[0] == layer_map[plan.student[0] - 1] + 1
    assert sum(plan.teacher) == 6
    # Forward and backward of the student, forward of the teacher; the last stage has both heads.
    cost = [3 * sum(student.blocks[: plan.student[0]]) + 5 * plan.teacher[0]]
    cost.append(3 * (sum(student.blocks) + 2) + 5 * 6 + 2 - cost[0])
    other = [3 * sum(student.blocks[:2]) + 5 * 2, 3 * (sum(student.blocks[2:]) + 2) + 5 * 4 + 2]
    assert max(cost) <= max(other)


def test_without_hidden_terms_each_model_is_cut_by_its_own_cost() -> None:
    plan = plan_stages(2, ModelCosts(blocks=[1, 1, 1, 9], head=0), ModelCosts(blocks=[9, 1, 1, 1], head=0))
    assert plan.student == (3, 1)
    assert plan.teacher == (1, 3)


def test_more_stages_than_blocks_that_compute_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine.pipeline_parallel=3 is more than the 2 blocks .* at most 2"):
        plan_stages(3, ModelCosts(blocks=[1, 0, 0, 1], head=1))
