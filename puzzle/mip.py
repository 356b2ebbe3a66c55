"""Mixed-integer search for one variant per block (Puzzle, appendix B), aware of FFN Fusion. Torch-free.

Variables: ``x[i,j]`` in {0, 1}, 1 where block i takes its j-th variant; one variant per block.
Objective: least sum of replace-1-block scores.
Budgets: any costs of the whole model, embedding, final norm and LM head included. The batch size is no variable: one
problem is solved for each.

Fusion-aware latency. ``a[i]`` in {0, 1} is the sum of ``x[i,j]`` over the attention-free variants of block i (no
attention, SwiGLU FFN). FFN Fusion leaves the last t FFNs of every run alone (t = 1 or 0) and makes of the other n of
them one FFN by n - 1 merges, if n is at least ``min_length``. Every merge saves ``c`` milliseconds of a latency, with a
``c`` of its own for decoding, prompt and request. With a pair variable for every two neighbouring blocks and a start
variable for every pair,

    z[i] <= a[i],  z[i] <= a[i+1]                 z[i] = 1: blocks i and i+1 are in one run
    s[0] >= z[0],  s[i] >= z[i] - z[i-1]          s[i] = 1: pair i is the first of its run
    s[i] <= z[i+k]  for 0 < k < min_length + t - 1    a run that starts is long enough (z beyond the end is 0)
    latency = sum of latency[i,j] * x[i,j] - c * (sum of z[i] - t * sum of s[i])

A run of k blocks has k - 1 pairs and one start, hence k - 1 - t merges; one that is too short has neither. The solver
may set fewer z than the runs allow, never more, and c >= 0: so x is feasible exactly if the latencies after fusion, by
this count, are within budget, however many of them have one. The rows of z and s are those of a shortest path, so they
have no fractional corners of their own; a and z are integer variables all the same, because branching on them splits
the problem far more evenly than branching on single variants. Bounds on the width or dependency of fused groups, which
the fuse stage may set, are not modelled.

One c for all merges is an approximation: cost tables have the median over the FFN widths of the space, 0 where it is
negative, while a merge of narrow FFNs and one of wide FFNs save different times.

Variants that another one of the same block makes superfluous (no worse in the objective or any budget, and
attention-free if they are) are left out, which changes no optimum; :mod:`puzzle.integer_program` leaves out more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import sparse
from scipy.optimize import LinearConstraint
from tqdm.auto import tqdm

from puzzle.integer_program import Program, TimeLimitError, minimise
from puzzle.search_problem import (
    TOLERANCE,
    Budget,
    InfeasibleError,
    Problem,
    Solution,
    budgets_of,
    solution_of,
)

EXPLANATION_GAP = 1e-4
"""Relative gap of the least costs that an error states, to the four digits that it shows."""

Method = Callable[[Problem, Sequence[Budget]], list[Solution]]
"""Solutions of a problem within budgets, best first."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the solver found."""

    blocks: tuple[str, ...]
    value: float
    """Of the objective."""
    bound: float
    """No choice is below it."""
    is_done: bool
    """Whether the gap asked for was reached; False at the time limit."""


@dataclass(frozen=True, kw_only=True)
class ParetoFront:
    """What the search finds at several latency budgets, as fractions of the parent's latency."""

    solutions: Mapping[float, Solution] = field(default_factory=dict)
    """By rising budget."""
    out_of_reach: tuple[float, ...] = ()
    """Budgets that no choice meets."""
    out_of_time: tuple[float, ...] = ()
    """Budgets at which the time limit passed before any choice was found."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How low one cost of the whole model can be."""

    value: float
    """The lowest that was found, to four digits from above; infinite where there was none."""
    is_least: bool
    """Whether nothing lower exists; False where the time limit passed before the proof."""


def solve(
    problem: Problem,
    budgets: Sequence[Budget],
    *,
    different_from: Sequence[Solution] = (),
    objective: np.ndarray | None = None,
    relative_gap: float = 0.0,
) -> Solution:
    """The choice with the least score.

    Args:
        problem: from :func:`puzzle.search_problem.build_problem`.
        budgets: all of them hold.
        different_from: solutions that the new one differs from in at least ``min_different_frac`` of the blocks.
        objective: what is minimised in place of the score, [num_variants].
        relative_gap: distance to the proven bound at which the solver may stop, relative to the objective.

    Raises:
        InfeasibleError: says which budget is out of reach, or which of them are together, and what can be reached.
        TimeLimitError: the time limit passed before any choice was found.
    """
    objective = problem.scores if objective is None else objective
    # HiGHS stops within an absolute gap of 1e-6, so the typical value is brought to 1.
    nonzero = np.abs(objective[objective != 0])
    scale = 1.0 / float(np.median(nonzero)) if nonzero.size else 1.0
    found = _run(problem, objective * scale, budgets, different_from, relative_gap=relative_gap)
    if found is None:
        raise InfeasibleError(lambda: _explain(problem, budgets, different_from))
    gap = max(0.0, found.value - found.bound) / max(abs(found.value), TOLERANCE)
    return solution_of(problem, found.blocks, status="optimal" if found.is_done else "time_limit", mip_gap=gap)


def find_solutions(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """Up to ``num_solutions`` solutions, best first; fewer where no further one that is different enough was found
    within the budgets and the time limit.

    Raises:
        InfeasibleError: there is not even one.
        TimeLimitError: not even one was found in time.
    """
    found = [solve(problem, budgets)]
    while len(found) < problem.config.num_solutions:
        try:
            found.append(solve(problem, budgets, different_from=found))
        except (InfeasibleError, TimeLimitError):
            break
    return found


def pareto_front(
    problem: Problem, *, find: Method = find_solutions, parent_throughput: float | None = None
) -> ParetoFront:
    """Best solution at each of ``pareto_latency_fracs``, the other budgets kept.

    Args:
        problem: from :func:`puzzle.search_problem.build_problem`.
        find: what chooses at every budget.
        parent_throughput: see :func:`puzzle.search_problem.budgets_of`.
    """
    problem = replace(problem, config=replace(problem.config, num_solutions=1))
    found: dict[float, Solution] = {}
    out_of_reach, out_of_time = [], []
    fracs = sorted(problem.config.pareto_latency_fracs)
    for frac in tqdm(fracs, desc="Pareto front", unit="budget", leave=False, disable=not fracs):
        constraint = replace(problem.config.constraint, latency_frac=frac, latency_ms=None)
        try:
            found[frac] = find(problem, budgets_of(problem, constraint, parent_throughput=parent_throughput))[0]
        except InfeasibleError:
            out_of_reach.append(frac)
        except TimeLimitError:
            out_of_time.append(frac)
    return ParetoFront(solutions=found, out_of_reach=tuple(out_of_reach), out_of_time=tuple(out_of_time))


def least_cost(problem: Problem, cost: str, budgets: Sequence[Budget]) -> Reach:
    """How low one cost of the whole model can be under ``budgets``, scores aside and fusion counted where the search is
    aware of it."""
    objective = problem.cost(cost)
    scale = np.abs(objective).max(initial=1e-300)
    saving = problem.saving_ms(cost) / scale
    try:
        found = _run(problem, objective / scale, budgets, (), saving=saving, relative_gap=EXPLANATION_GAP)
    except TimeLimitError:
        return Reach(value=math.inf, is_least=False)
    if found is None:
        return Reach(value=math.inf, is_least=True)
    return Reach(value=problem.spent(found.blocks, cost), is_least=found.is_done)


def _run(
    problem: Problem,
    objective: np.ndarray,
    budgets: Sequence[Budget],
    different_from: Sequence[Solution],
    *,
    saving: float = 0.0,
    relative_gap: float = 0.0,
) -> Choice | None:
    """Minimise ``objective @ x - saving * merges``; None where no choice is within the budgets."""
    costs = np.stack([objective, *(problem.cost(budget.cost) for budget in budgets)])
    # Another solution that must differ may need a variant that is second best in everything.
    kept = np.arange(len(objective)) if different_from else _undominated(problem, costs)
    is_fused = saving > 0 or any(problem.saving_ms(budget.cost) > 0 for budget in budgets)
    constraints, merges = _structure(problem, kept, is_fused)
    num_rest = len(merges) - len(kept)

    def row(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[kept], np.zeros(num_rest)])

    for budget, cost in zip(budgets, costs[1:], strict=True):
        # The typical block is scaled to 1, where HiGHS' tolerance is relative.
        unit = (budget.limit or 1.0) / problem.num_blocks
        values = (row(cost) - problem.saving_ms(budget.cost) * merges) / unit
        rest = (budget.limit - problem.costs.outside[budget.cost]) / unit
        constraints.append(LinearConstraint(values[None, :], -np.inf, rest))
    most_equal = problem.num_blocks - math.ceil(problem.config.min_different_frac * problem.num_blocks - TOLERANCE)
    for solution in different_from:
        same = np.array([solution.blocks[block] == variant for block, variant in problem.variants], dtype=float)
        constraints.append(LinearConstraint(row(same)[None, :], -np.inf, most_equal))
    program = Program(
        objective=row(objective) - saving * merges,
        is_integer=merges >= 0,
        matrix=sparse.vstack([constraint.A for constraint in constraints], format="csc"),
        lower=np.concatenate([np.broadcast_to(constraint.lb, constraint.A.shape[:1]) for constraint in constraints]),
        upper=np.concatenate([np.broadcast_to(constraint.ub, constraint.A.shape[:1]) for constraint in constraints]),
    )
    found = minimise(
        program,
        num_blocks=problem.num_blocks,
        num_x=len(kept),
        relative_gap=relative_gap,
        limit_seconds=problem.config.time_limit_seconds,
    )
    if found is None:
        return None
    x, bound, is_done = found
    chosen = kept[np.rint(x[: len(kept)]) == 1]
    assert [problem.variants[index][0] for index in chosen] == list(range(problem.num_blocks))
    blocks = tuple(problem.variants[index][1] for index in chosen)
    return Choice(blocks=blocks, value=float(program.objective @ x), bound=bound, is_done=is_done)


def _undominated(problem: Problem, costs: np.ndarray) -> np.ndarray:
    """Indices of the variants that may stand in a best choice, rising.

    Args:
        problem: whose variants.
        costs: objective and budgeted costs, [num_costs, num_variants].
    """
    # Being attention-free never hurts: it can only add merges.
    rows = np.concatenate([costs, -problem.is_free[None].astype(float)])
    kept = []
    for block in range(problem.num_blocks):
        indices = np.flatnonzero(problem.block_of == block)
        values = rows[:, indices]
        no_worse = (values[:, :, None] <= values[:, None, :]).all(axis=0)
        # Of two that are equal in everything the first one stays.
        is_first = np.tri(len(indices), k=-1, dtype=bool).T
        beaten = no_worse & (~no_worse.T | is_first)
        kept.append(indices[~beaten.any(axis=0)])
    return np.concatenate(kept)


def _structure(problem: Problem, kept: np.ndarray, is_fused: bool) -> tuple[list[LinearConstraint], np.ndarray]:
    """Rows over [x, a, z, s] that say what a choice is, and what every variable adds to the number of merges."""
    num_blocks, num_x = problem.num_blocks, len(kept)
    picks = sparse.csr_array((np.ones(num_x), (problem.block_of[kept], np.arange(num_x))), shape=(num_blocks, num_x))
    if not is_fused or num_blocks < 2:
        return [LinearConstraint(picks, 1, 1)], np.zeros(num_x)
    rule, num_pairs = problem.fusion, num_blocks - 1
    shift = rule.min_length + rule.leave_last_out - 2
    num_starts = num_pairs if shift > 0 else 0
    a, z, s = sparse.eye_array(num_blocks), sparse.eye_array(num_pairs), sparse.eye_array(num_pairs, num_starts)
    no_x, no_a = sparse.csr_array((num_pairs, num_x)), sparse.csr_array((num_pairs, num_blocks))
    no_s = sparse.csr_array((num_pairs, num_starts))
    no_zs = sparse.csr_array((num_blocks, num_pairs + num_starts))

    def at_most_zero(*parts: sparse.sparray) -> LinearConstraint:
        return LinearConstraint(sparse.hstack(parts, format="csr"), -np.inf, 0)

    free = picks.multiply(problem.is_free[kept]).tocsr()
    constraints = [
        LinearConstraint(sparse.hstack([picks, sparse.csr_array((num_blocks, num_blocks)), no_zs]), 1, 1),
        LinearConstraint(sparse.hstack([free, -a, no_zs]), 0, 0),
        *(at_most_zero(no_x, -sparse.eye_array(num_pairs, num_blocks, k=k), z, no_s) for k in (0, 1)),
    ]
    if num_starts:
        constraints.append(at_most_zero(no_x, no_a, z - sparse.eye_array(num_pairs, k=-1), -s))
    if rule.min_length > 2:
        windows = range(1, rule.min_length + rule.leave_last_out - 1)
        constraints += [at_most_zero(no_x, no_a, -sparse.eye_array(num_pairs, k=k), s) for k in windows]
    merges = [np.zeros(num_x + num_blocks), np.ones(num_pairs), -float(rule.leave_last_out) * np.ones(num_starts)]
    return constraints, np.concatenate(merges)


def _is_within(problem: Problem, budgets: Sequence[Budget], solution: Solution) -> bool:
    return all(problem.spent(solution.blocks, b.cost) <= b.limit + TOLERANCE * abs(b.limit) for b in budgets)


def _explain(problem: Problem, budgets: Sequence[Budget], different_from: Sequence[Solution]) -> str:
    """One line: what cannot be reached, what can, what to relax."""
    if any(_is_within(problem, budgets, solution) for solution in different_from):
        return (
            f"search: no further choice differs from {len(different_from)} solutions in "
            f"min_different_frac={problem.config.min_different_frac:g} of the blocks within the budgets; lower it"
        )
    alone = [(budget, least_cost(problem, budget.cost, ())) for budget in budgets]
    unreachable = [
        f"{budget} is out of reach, the {budget.extreme} is {budget.setting(reach.value)}"
        for budget, reach in alone
        if reach.is_least and reach.value > budget.limit * (1 + TOLERANCE)
    ]
    if unreachable:
        return f"search.constraint: {'; '.join(unreachable)}, scores and other budgets aside; relax it, or widen space"
    if not all(reach.is_least for _, reach in alone):
        # Some may be out of reach by themselves.
        what = "the budgets are out of reach together"
    else:
        what = "each budget is within reach, all together are not"
    facts = ", ".join(
        f"{budget} (alone {'up' if budget.is_rate else 'down'} to {budget.setting(reach.value)}"
        f"{'' if reach.is_least else ' or beyond'})"
        for budget, reach in alone
        if reach.value < math.inf
    )
    # What was found without a proof is within reach all the same.
    beside = [
        (budget, least_cost(problem, budget.cost, [other for other in budgets if other is not budget]))
        for budget in budgets
    ]
    ways = [budget.setting(reach.value) for budget, reach in beside if reach.value < math.inf]
    way_out = f"keep the others and set {' or '.join(ways)}" if ways else "relax several of them"
    return f"search.constraint: {what}: {facts}; {way_out}, or widen space"
