"""Other ways to choose variants under the same budgets, to compare the mixed-integer search with. Torch-free.

Every one respects all budgets, after fusion where the search is aware of it, or raises :class:`InfeasibleError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from distill.config import require
from puzzle.mip import Method, find_solutions, solve
from puzzle.model.architecture import NO_ATTENTION, NO_FFN
from puzzle.search_problem import TOLERANCE, Budget, InfeasibleError, Problem, Solution, solution_of
from puzzle.tables import parse_variant


def find(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """What ``search.method`` finds, best first: up to ``search.num_solutions`` by a MIP, one by a baseline.

    Raises:
        InfeasibleError: there is no choice within the budgets, or the baseline does not come to one.
        ValueError: a baseline is asked for several solutions, or for variants whose names it cannot read.
    """
    config = problem.config
    method = METHODS[config.method]
    require(
        method in (find_solutions, no_op_only) or config.num_solutions == 1,
        f"search.num_solutions={config.num_solutions}, but search.method={config.method} finds one; set it to 1",
    )
    return method(problem, budgets)


def greedy(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """Every budget split evenly over the blocks; blocks by ascending mean score of their variants; in each the variant
    of the least score within its share, which what others left is added to (Puzzle, appendix F.2.2).

    Where no variant fits the share, the one that exceeds it least is taken and the blocks that follow pay the rest.
    What a variant merges with those taken before counts as saved.
    """
    limits = np.array([budget.limit for budget in budgets])
    outside = np.array([problem.costs.outside[budget.cost] for budget in budgets])
    savings = np.array([problem.saving_ms(budget.cost) for budget in budgets])
    costs = np.array([problem.cost(budget.cost) for budget in budgets]).reshape(len(budgets), len(problem.variants)).T
    of_block = [np.flatnonzero(problem.block_of == block) for block in range(problem.num_blocks)]
    share = (limits - outside) / problem.num_blocks
    left = np.zeros_like(limits)
    is_taken_free = np.zeros(problem.num_blocks, dtype=bool)
    chosen: dict[int, int] = {}
    for block in np.argsort([problem.scores[indices].mean() for indices in of_block], kind="stable"):
        indices, allowance = of_block[block], share + left
        before = problem.fusion.num_merges(is_taken_free)
        is_taken_free[block] = True
        gain = problem.fusion.num_merges(is_taken_free) - before
        takes = costs[indices] - gain * problem.is_free[indices, None] * savings
        excess = ((takes - allowance) / np.maximum(np.abs(limits), 1e-300)).max(axis=1, initial=-np.inf)
        fits = np.flatnonzero(excess <= 0)
        best = fits[problem.scores[indices[fits]].argmin()] if fits.size else excess.argmin()
        is_taken_free[block] = problem.is_free[indices[best]]
        left = allowance - takes[best]
        chosen[block] = indices[best]
    blocks = [problem.variants[chosen[block]][1] for block in range(problem.num_blocks)]
    _require_within(problem, budgets, blocks)
    return [solution_of(problem, blocks)]


def attention_pruning(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """Attentions removed from the parent, lowest score first, until the budgets hold; FFNs stay as they are.

    Where scores are conditional, they are removed from the model that the scores are changes to.
    """
    blocks = list(problem.base)
    candidates = []
    for (block, variant), score in zip(problem.variants, problem.scores, strict=True):
        attention, ffn = parse_variant(variant)
        own_attention, own_ffn = parse_variant(problem.base[block])
        if attention == NO_ATTENTION != own_attention and ffn == own_ffn:
            candidates.append((float(score), block, variant))
    for _, block, variant in sorted(candidates):
        if _exceeded(problem, budgets, blocks) is None:
            break
        blocks[block] = variant
    _require_within(problem, budgets, blocks)
    return [solution_of(problem, blocks)]


def random_choice(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """Every variant draws a number, and the least sum of numbers within the budgets is taken: without budgets every
    choice is as likely as any other. Seeded by ``search.random_seed``."""
    found = solve(problem, budgets, objective=_lots(problem), relative_gap=1e-2)
    return [replace(found, status="heuristic", mip_gap=None)]


def max_params(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """The most parameters within the budgets, whatever the scores."""
    problem.costs.require_known("params", reason="search.method=max_params")
    return [solve(problem, budgets, objective=-problem.cost("params"))]


def no_op_only(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """The mixed-integer search over whole subblocks: each is the parent's own or removed."""
    scores = dict(zip(problem.variants, problem.scores, strict=True))
    kept = []
    for block, variant in problem.variants:
        attention, ffn = parse_variant(variant)
        own_attention, own_ffn = parse_variant(problem.parent[block])
        if attention in (own_attention, NO_ATTENTION) and ffn in (own_ffn, NO_FFN):
            kept.append((block, variant))
    smaller = replace(problem, variants=tuple(kept), scores=np.array([scores[key] for key in kept]))
    return find_solutions(smaller, budgets)


METHODS: Mapping[str, Method] = {
    "mip": find_solutions,
    "greedy": greedy,
    "attention_pruning": attention_pruning,
    "random": random_choice,
    "max_params": max_params,
    "no_op_only": no_op_only,
}
"""``search.method`` -> what it does."""


def merit(problem: Problem, solution: Solution) -> float:
    """What the method of a solution minimises: of solutions at several batch sizes the least one is the method's."""
    if solution.method == "max_params":
        return -solution.costs["params"]
    if solution.method == "random":
        lots = dict(zip(problem.variants, _lots(problem), strict=True))
        return float(sum(lots[key] for key in enumerate(solution.blocks)))
    return solution.score


def _lots(problem: Problem) -> np.ndarray:
    """The number that every variant draws, the same at every batch size, [num_variants]."""
    return np.random.default_rng(problem.config.random_seed).uniform(1.0, 2.0, len(problem.scores))


def _exceeded(problem: Problem, budgets: Sequence[Budget], blocks: Sequence[str]) -> Budget | None:
    """The first budget that a choice exceeds."""
    over = (b for b in budgets if problem.spent(blocks, b.cost) > b.limit + TOLERANCE * abs(b.limit))
    return next(over, None)


def _require_within(problem: Problem, budgets: Sequence[Budget], blocks: Sequence[str]) -> None:
    exceeded = _exceeded(problem, budgets, blocks)
    if exceeded is not None:
        reached = exceeded.setting(problem.spent(blocks, exceeded.cost))
        raise InfeasibleError(
            f"search.method={problem.config.method} does not come within {exceeded}, it ends at {reached}; relax it, "
            "or try search.method=mip, which finds a choice wherever there is one"
        )
