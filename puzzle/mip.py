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
may set fewer z than the runs allow, never more, and c >= 0: so x is feasible exactly if the true latencies after fusion
are within budget, however many of them have one. The rows of z and s are those of a shortest path, so they have no
fractional corners of their own; a and z are integer variables all the same, because branching on them splits the
problem far more evenly than branching on single variants. Bounds on the width or dependency of fused groups, which the
fuse stage may set, are not modelled.

Two reductions shorten the search without changing any optimum. Variants that another one of the same block makes
superfluous (no worse in the objective or any budget, and attention-free if they are) are left out. And a choice that
has a variant of reduced cost r in the linear relaxation is worth at least the relaxation's optimum plus r: the solver
is given the few variants of small r, and again those up to the difference if what it finds is further away.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from tqdm.auto import tqdm

from distill.config import require
from puzzle.search_problem import TOLERANCE, Budget, InfeasibleError, Problem, Solution, budgets_of, solution_of

OPTIMAL, INFEASIBLE = 0, 2
"""Statuses of ``scipy.optimize.milp`` and ``linprog``."""
ABSOLUTE_GAP = 1e-6
"""At which HiGHS stops."""
CORE_VARIANTS = 3
"""Variants per block, on average, that the solver is given first."""
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
class Program:
    """A mixed-integer program over variables in 0..1: least ``objective @ v`` with ``lower <= matrix @ v <= upper``."""

    objective: np.ndarray
    is_integer: np.ndarray
    matrix: sparse.csc_array
    lower: np.ndarray
    upper: np.ndarray

    def relax(self) -> OptimizeResult:
        """The optimum without integrality, with the reduced costs of all variables."""
        is_equal = self.lower == self.upper
        rows = self.matrix.tocsr()
        return linprog(
            self.objective,
            A_ub=rows[~is_equal],
            b_ub=self.upper[~is_equal],
            A_eq=rows[is_equal],
            b_eq=self.upper[is_equal],
            bounds=(0, 1),
            method="highs",
        )

    def solve(self, columns: np.ndarray, relative_gap: float, limit_seconds: float) -> OptimizeResult:
        """The optimum with all other variables at 0."""
        with _quiet():
            return milp(
                self.objective[columns],
                integrality=self.is_integer[columns].astype(int),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(self.matrix[:, columns], self.lower, self.upper),
                options={"mip_rel_gap": relative_gap, "time_limit": limit_seconds},
            )


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
        ValueError: the time limit passed before any choice was found.
    """
    objective = problem.scores if objective is None else objective
    # HiGHS stops within an absolute gap of 1e-6, so the typical value is brought to 1.
    nonzero = np.abs(objective[objective != 0])
    scale = 1.0 / float(np.median(nonzero)) if nonzero.size else 1.0
    found = _run(problem, objective * scale, budgets, different_from, relative_gap=relative_gap)
    if found is None:
        raise InfeasibleError(_explain(problem, budgets, different_from))
    gap = max(0.0, found.value - found.bound) / max(abs(found.value), TOLERANCE)
    return solution_of(problem, found.blocks, status="optimal" if found.is_done else "time_limit", mip_gap=gap)


def find_solutions(problem: Problem, budgets: Sequence[Budget]) -> list[Solution]:
    """Up to ``num_solutions`` solutions, best first; fewer where no further one is different enough within the budgets.

    Raises:
        InfeasibleError: there is not even one.
    """
    found = [solve(problem, budgets)]
    while len(found) < problem.config.num_solutions:
        try:
            found.append(solve(problem, budgets, different_from=found))
        except InfeasibleError:
            break
    return found


def pareto_front(
    problem: Problem, *, find: Method = find_solutions, parent_throughput: float | None = None
) -> dict[float, Solution | None]:
    """Best solution at each of ``pareto_latency_fracs``, the other budgets kept; None where there is none.

    Args:
        problem: from :func:`puzzle.search_problem.build_problem`.
        find: what chooses at every budget.
        parent_throughput: see :func:`puzzle.search_problem.budgets_of`.
    """
    problem = replace(problem, config=replace(problem.config, num_solutions=1))
    front: dict[float, Solution | None] = {}
    fracs = sorted(problem.config.pareto_latency_fracs)
    for frac in tqdm(fracs, desc="Pareto front", unit="budget", leave=False, disable=not fracs):
        constraint = replace(problem.config.constraint, latency_frac=frac, latency_ms=None)
        try:
            front[frac] = find(problem, budgets_of(problem, constraint, parent_throughput=parent_throughput))[0]
        except InfeasibleError:
            front[frac] = None
    return front


def least_cost(problem: Problem, cost: str, budgets: Sequence[Budget]) -> float | None:
    """Least value of one cost of the whole model under ``budgets``, scores aside and fusion counted where the search
    is aware of it, to four digits from above; None where the budgets are out of reach."""
    objective = problem.cost(cost)
    scale = np.abs(objective).max(initial=1e-300)
    saving = problem.saving_ms(cost) / scale
    found = _run(problem, objective / scale, budgets, (), saving=saving, relative_gap=EXPLANATION_GAP)
    return None if found is None else problem.spent(found.blocks, cost)


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
    found = _minimise(program, problem.num_blocks, len(kept), relative_gap, problem.config.time_limit_seconds)
    if found is None:
        return None
    x, bound, is_done = found
    chosen = kept[np.rint(x[: len(kept)]) == 1]
    assert [problem.variants[index][0] for index in chosen] == list(range(problem.num_blocks))
    blocks = tuple(problem.variants[index][1] for index in chosen)
    return Choice(blocks=blocks, value=float(program.objective @ x), bound=bound, is_done=is_done)


def _minimise(
    program: Program, num_blocks: int, num_x: int, relative_gap: float, limit_seconds: float
) -> tuple[np.ndarray, float, bool] | None:
    """Solution, proven bound, and whether the gap was reached in time; None where the program is infeasible."""
    end = time.perf_counter() + limit_seconds
    relaxed = program.relax()
    if relaxed.status == INFEASIBLE:
        return None
    reduced = relaxed.lower.marginals[:num_x] if relaxed.status == OPTIMAL else np.zeros(num_x)
    reach = float(np.sort(reduced)[min(num_x - 1, CORE_VARIANTS * num_blocks)])
    found: tuple[np.ndarray, float, bool] | None = None
    while True:
        core = np.concatenate([np.flatnonzero(reduced <= reach), np.arange(num_x, len(program.objective))])
        beyond = math.inf if len(core) == len(program.objective) else relaxed.fun + reach
        result = program.solve(core, relative_gap, max(0.1 * limit_seconds, end - time.perf_counter()))
        if result.x is None:
            if result.status != INFEASIBLE or beyond == math.inf:
                break
            reach = math.inf
            continue
        x = np.zeros(len(program.objective))
        x[core] = result.x
        found = x, min(result.mip_dual_bound, beyond), result.status == OPTIMAL
        if result.status != OPTIMAL or result.fun - beyond <= relative_gap * abs(result.fun) + ABSOLUTE_GAP:
            return found
        # What is left out and could still be better than what was found.
        reach = result.fun - relaxed.fun
    require(
        found is not None or result.status == INFEASIBLE,
        f"search.time_limit_seconds={limit_seconds:g} passed before any choice was found ({result.message}); raise it",
    )
    return found and (found[0], found[1], False)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a line that the HiGHS in some versions of scipy prints from its C++ code, for debugging, off the console."""
    try:
        flush = ctypes.CDLL(None).fflush
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, TypeError, AttributeError):  # no such C library, or no standard output
        yield
        return
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _explain(problem: Problem, budgets: Sequence[Budget], different_from: Sequence[Solution]) -> str:
    """One line: what cannot be reached, what can, what to relax."""
    if different_from and _run(problem, problem.scores, budgets, (), relative_gap=1.0) is not None:
        return (
            f"search: no further choice differs from {len(different_from)} solutions in "
            f"min_different_frac={problem.config.min_different_frac:g} of the blocks within the budgets; lower it"
        )
    alone = [(budget, least_cost(problem, budget.cost, ())) for budget in budgets]
    unreachable = [
        f"{budget} is out of reach, the {budget.extreme} is {budget.setting(least)}"
        for budget, least in alone
        if least is not None and least > budget.limit * (1 + TOLERANCE)
    ]
    if unreachable:
        return f"search.constraint: {'; '.join(unreachable)}, scores and other budgets aside; relax it, or widen space"
    facts = ", ".join(
        f"{budget} (alone {'up' if budget.is_rate else 'down'} to {budget.setting(least)})"
        for budget, least in alone
        if least is not None
    )
    ways = []
    for budget in budgets:
        least = least_cost(problem, budget.cost, [other for other in budgets if other is not budget])
        if least is not None:
            ways.append(budget.setting(least))
    way_out = f"keep the others and set {' or '.join(ways)}" if ways else "relax at least two of them"
    return f"search.constraint: each budget is within reach, all together are not: {facts}; {way_out}, or widen space"
