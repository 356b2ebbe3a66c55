"""Mixed-integer search for one variant per block (Puzzle, appendix B), aware of FFN Fusion. Torch-free.

Variables: ``x[i,j]`` in {0, 1}, 1 where block i takes its j-th variant; one variant per block.
Objective: least sum of replace-1-block scores.
Budgets: latency, memory and parameters of the whole model, embedding, final norm and LM head included.

Fusion-aware latency. Let ``a[i]`` be the sum of ``x[i,j]`` over the attention-free variants of block i (no attention,
SwiGLU FFN); it is 0 or 1. FFN Fusion turns a run of k attention-free blocks into one FFN by k - 1 merges, or by
max(0, k - 2) merges where the last FFN of every run is left out, and each merge saves ``c`` milliseconds. With a pair
variable for every two neighbouring blocks and a start variable for every pair, all in [0, 1]:

    z[i] <= a[i],  z[i] <= a[i+1]                 z[i] = 1: blocks i and i+1 are in one run
    s[0] >= z[0],  s[i] >= z[i] - z[i-1]          s[i] = 1: pair i is the first of its run
    latency = sum of latency[i,j] * x[i,j] - c * (sum of z[i] - sum of s[i])

A run of k >= 2 blocks has k - 1 pairs and one start, hence k - 2 merges; a run of 1 has neither. Where the last FFN is
fused too, the s[i] are absent. c >= 0, so only the largest number of merges matters for a given x. It is reached at
z[i] = a[i] * a[i+1]: raising a z[i] within its bounds adds 1 and starts at most one run, and as the s[i] follow
differences of neighbouring z[i], an integral point is among the best. So x is feasible exactly if the true latency
after fusion is within budget, and z and s need not be integer variables. Bounds on the width, length or dependency of
fused groups, which the fuse stage may set, are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from tqdm.auto import tqdm

from distill.config import require
from puzzle.config import ConstraintConfig, SearchConfig
from puzzle.model.architecture import BlockConfig
from puzzle.tables import CostTable, TotalCost, parse_variant

GIB = 2**30
TOLERANCE = 1e-6
"""Relative excess over a budget that HiGHS accepts."""
OPTIMAL, AT_LIMIT, INFEASIBLE = 0, 1, 2
"""Statuses of ``scipy.optimize.milp``."""

Cost = Literal["latency_ms", "memory_bytes", "params"]
COSTS: tuple[Cost, ...] = ("latency_ms", "memory_bytes", "params")


class InfeasibleError(ValueError):
    """No choice of variants meets the budgets."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bound on one cost of the whole model."""

    key: str
    """Field of :class:`ConstraintConfig`."""
    cost: Cost
    unit: float
    """What one unit of the field is worth: the parent's cost where it is a fraction."""
    value: float
    """In units of the field."""

    @property
    def limit(self) -> float:
        """In the unit of the cost."""
        return self.value * self.unit

    def __str__(self) -> str:
        return f"{self.key}={self.value:g}"

    def setting(self, cost: float) -> str:
        """The least setting of the field that admits ``cost``, rounded up to 4 digits: ``latency_frac=0.6132``."""
        value = cost / self.unit
        step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
        return (
            f"{self.key}={math.ceil(value / step) * step:.4g}" if self.key != "params" else f"params={math.ceil(value)}"
        )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One variant per block."""

    blocks: tuple[str, ...]
    score: float
    """Sum of the replace-1-block scores."""
    costs: TotalCost
    """Before fusion."""
    predicted_fused_latency_ms: float
    """Latency of the phase that the search is about, after the attention-free runs are fused."""
    num_merges: int
    status: Literal["optimal", "time_limit"]
    """optimal: proven; time_limit: within the budgets, but mip_gap away from the proof."""
    mip_gap: float
    """Distance of the score to the proven bound, relative to the score."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Scores and costs as vectors over the variables x, then z, then s (see the module's docstring)."""

    variants: tuple[tuple[int, str], ...]
    """Block and variant of every x."""
    parent: tuple[str, ...]
    """The parent's own variant of every block."""
    table: CostTable
    config: SearchConfig
    leave_last_out: bool
    scores: np.ndarray
    """[num_variables], 0 beyond x."""
    costs: Mapping[Cost, np.ndarray]
    """[num_variables] each; latency has the saving of merges at z and s."""
    outside: Mapping[Cost, float]
    """Embedding, final norm and LM head."""
    structure: tuple[LinearConstraint, ...]
    """One variant per block, and what ties z and s to x."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the parent."""
        return len(self.parent)

    @property
    def parent_costs(self) -> TotalCost:
        """What the parent costs, nothing fused."""
        return self.table.model(self.parent)

    def latency_ms(self, total: TotalCost) -> float:
        """Latency of the phase that the search is about."""
        return getattr(total, f"{self.config.latency}_ms")


def build_problem(
    scores: Sequence[Mapping[str, float]],
    table: CostTable,
    parent: Sequence[str],
    config: SearchConfig,
    *,
    leave_last_out: bool = True,
) -> Problem:
    """Lay out the variables.

    Args:
        scores: per block, the score of every variant that may stand there; lower is better.
        table: the costs of all their subblocks.
        parent: the parent's own variant of every block.
        config: latency phase, fusion awareness and limits; budgets are given when solving.
        leave_last_out: fusion leaves the last FFN of every run alone (FFN Fusion, Table 5).

    Raises:
        ValueError: the tables do not cover the same blocks and variants.
    """
    require(
        len(scores) == len(parent),
        f"scores cover {len(scores)} blocks, the parent of the costs has {len(parent)}; take both from one parent",
    )
    for block, (row, own) in enumerate(zip(scores, parent, strict=True)):
        require(own in row, f"scores: block {block} lacks the parent's own variant {own}; it has {', '.join(row)}")
    variants = tuple((block, variant) for block, row in enumerate(scores) for variant in row)
    free = np.array([is_attention_free(variant) for _, variant in variants])
    saving_ms = table.merge_saving_ms(config.latency) if config.fusion_aware else 0.0
    num_pairs = len(parent) - 1 if saving_ms > 0 else 0
    num_starts = num_pairs if leave_last_out else 0
    tail = np.concatenate([np.ones(num_pairs), -np.ones(num_starts)])
    totals = [_costs(table.block(variant), config) for _, variant in variants]
    costs: dict[Cost, np.ndarray] = {}
    for cost in COSTS:
        merged = -saving_ms * tail if cost == "latency_ms" else np.zeros_like(tail)
        costs[cost] = np.concatenate([np.array([total[cost] for total in totals], dtype=float), merged])
    return Problem(
        variants=variants,
        parent=tuple(parent),
        table=table,
        config=config,
        leave_last_out=leave_last_out,
        scores=np.concatenate([np.array([scores[block][name] for block, name in variants]), np.zeros_like(tail)]),
        costs=costs,
        outside=_costs(table.outside_blocks(), config),
        structure=_structure(np.array([block for block, _ in variants]), free, num_pairs, num_starts),
    )


def budgets_of(problem: Problem, constraint: ConstraintConfig) -> tuple[Budget, ...]:
    """The budgets that are set; fractions are of the parent's cost in the same table, nothing fused."""
    parent = _costs(problem.parent_costs, problem.config)
    units: dict[str, tuple[Cost, float]] = {
        "latency_frac": ("latency_ms", parent["latency_ms"]),
        "latency_ms": ("latency_ms", 1.0),
        "memory_frac": ("memory_bytes", parent["memory_bytes"]),
        "memory_gib": ("memory_bytes", GIB),
        "params_frac": ("params", parent["params"]),
        "params": ("params", 1.0),
    }
    return tuple(
        Budget(key=key, cost=cost, unit=unit, value=value)
        for key, (cost, unit) in units.items()
        if (value := getattr(constraint, key)) is not None
    )


def solve(problem: Problem, budgets: Sequence[Budget], *, different_from: Sequence[Solution] = ()) -> Solution:
    """The choice with the least score.

    Args:
        problem: from :func:`build_problem`.
        budgets: all of them hold.
        different_from: solutions that the new one differs from in at least ``min_different_frac`` of the blocks.

    Raises:
        InfeasibleError: says which budget is out of reach, or which of them are together, and what can be reached.
        ValueError: the time limit passed before any choice was found.
    """
    # HiGHS stops within an absolute gap of 1e-6, so the typical score is brought to 1.
    nonzero = np.abs(problem.scores[problem.scores != 0])
    scale = 1.0 / float(np.median(nonzero)) if nonzero.size else 1.0
    result = _run(problem, problem.scores * scale, budgets, different_from)
    if result.status == INFEASIBLE:
        raise InfeasibleError(_explain(problem, budgets, different_from))
    blocks = _blocks(problem, result.x)
    gap = max(0.0, result.fun - result.mip_dual_bound) / max(abs(result.fun), TOLERANCE)
    costs = problem.table.model(blocks)
    merges = num_merges(blocks, leave_last_out=problem.leave_last_out)
    saving_ms = problem.table.merge_saving_ms(problem.config.latency)
    score_of = dict(zip(problem.variants, problem.scores, strict=False))
    return Solution(
        blocks=blocks,
        score=math.fsum(score_of[key] for key in enumerate(blocks)),
        costs=costs,
        predicted_fused_latency_ms=problem.latency_ms(costs) - merges * saving_ms,
        num_merges=merges,
        status="optimal" if result.status == OPTIMAL else "time_limit",
        mip_gap=gap,
    )


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


def pareto_front(problem: Problem) -> dict[float, Solution | None]:
    """Best solution at each of ``pareto_latency_fracs``, the other budgets kept; None where there is none."""
    front: dict[float, Solution | None] = {}
    for frac in tqdm(sorted(problem.config.pareto_latency_fracs), desc="Pareto front", unit="budget", leave=False):
        constraint = replace(problem.config.constraint, latency_frac=frac, latency_ms=None)
        try:
            front[frac] = solve(problem, budgets_of(problem, constraint))
        except InfeasibleError:
            front[frac] = None
    return front


def least_cost(problem: Problem, cost: Cost, budgets: Sequence[Budget]) -> float | None:
    """Least value of one cost of the whole model under ``budgets``, scores aside; None where these are out of reach."""
    objective = problem.costs[cost]
    result = _run(problem, objective / np.abs(objective).max(initial=1e-300), budgets, ())
    if result.status == INFEASIBLE:
        return None
    return float(objective @ result.x) + problem.outside[cost]


def num_merges(blocks: Sequence[str], *, leave_last_out: bool) -> int:
    """Merges that fuse the attention-free runs of a model given by its variants."""
    runs = [sum(1 for _ in run) for free, run in groupby(blocks, key=is_attention_free) if free]
    return sum(max(0, length - (2 if leave_last_out else 1)) for length in runs)


def is_attention_free(variant: str) -> bool:
    """Whether a variant is material of FFN Fusion."""
    attention, ffn = parse_variant(variant)
    return BlockConfig(attention=attention, ffn=ffn, parent_block_indices=()).is_attention_free


def _costs(total: TotalCost, config: SearchConfig) -> dict[Cost, float]:
    return {
        "latency_ms": getattr(total, f"{config.latency}_ms"),
        "memory_bytes": total.memory_bytes,
        "params": total.params,
    }


def _structure(block_of: np.ndarray, free: np.ndarray, num_pairs: int, num_starts: int) -> tuple[LinearConstraint, ...]:
    """Rows over [x, z, s]: one variant per block; z under both of its blocks; s over the rise of z."""
    num_x = len(block_of)
    pick = sparse.csr_array((np.ones(num_x), (block_of, np.arange(num_x))))
    one_per_block = sparse.hstack([pick, sparse.csr_array((pick.shape[0], num_pairs + num_starts))], format="csr")
    constraints = [LinearConstraint(one_per_block, 1, 1)]
    if num_pairs:
        attention_free = pick.multiply(free).tocsr()
        identity = sparse.eye_array(num_pairs)
        no_starts = sparse.csr_array((num_pairs, num_starts))
        for neighbour in (attention_free[:-1], attention_free[1:]):
            constraints.append(
                LinearConstraint(sparse.hstack([-neighbour, identity, no_starts], format="csr"), -np.inf, 0)
            )
    if num_starts:
        rise = sparse.eye_array(num_pairs) - sparse.eye_array(num_pairs, k=-1)
        no_x = sparse.csr_array((num_pairs, num_x))
        starts = sparse.hstack([no_x, rise, -sparse.eye_array(num_starts)], format="csr")
        constraints.append(LinearConstraint(starts, -np.inf, 0))
    return tuple(constraints)


def _run(
    problem: Problem, objective: np.ndarray, budgets: Sequence[Budget], different_from: Sequence[Solution]
) -> OptimizeResult:
    constraints = list(problem.structure)
    for budget in budgets:
        # Scaled to 1, where HiGHS' tolerance is relative.
        row = problem.costs[budget.cost] / budget.limit
        constraints.append(LinearConstraint(row[None, :], -np.inf, 1 - problem.outside[budget.cost] / budget.limit))
    most_equal = problem.num_blocks - math.ceil(problem.config.min_different_frac * problem.num_blocks - TOLERANCE)
    for solution in different_from:
        same = np.zeros_like(objective)
        same[[i for i, (block, variant) in enumerate(problem.variants) if solution.blocks[block] == variant]] = 1
        constraints.append(LinearConstraint(same[None, :], -np.inf, most_equal))
    integral = np.arange(len(objective)) < len(problem.variants)
    limit = problem.config.time_limit_seconds
    result = milp(
        objective,
        integrality=integral.astype(int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "time_limit": limit},
    )
    require(
        result.x is not None or result.status == INFEASIBLE,
        f"search.time_limit_seconds={limit:g} passed before any choice was found ({result.message}); raise it",
    )
    return result


def _blocks(problem: Problem, x: np.ndarray) -> tuple[str, ...]:
    chosen = [key for key, value in zip(problem.variants, np.rint(x), strict=False) if value == 1]
    assert [block for block, _ in chosen] == list(range(problem.num_blocks))
    return tuple(variant for _, variant in chosen)


def _explain(problem: Problem, budgets: Sequence[Budget], different_from: Sequence[Solution]) -> str:
    """One line: what cannot be reached, what can, what to relax."""
    if different_from and _run(problem, problem.scores, budgets, ()).status != INFEASIBLE:
        return (
            f"search: no further choice differs from {len(different_from)} solutions in "
            f"min_different_frac={problem.config.min_different_frac:g} of the blocks within the budgets; lower it"
        )
    alone = [(budget, least_cost(problem, budget.cost, ())) for budget in budgets]
    unreachable = [
        f"{budget} is out of reach, the least is {budget.setting(least)}"
        for budget, least in alone
        if least is not None and least > budget.limit * (1 + TOLERANCE)
    ]
    if unreachable:
        return f"search.constraint: {'; '.join(unreachable)}, scores and other budgets aside; raise it, or widen space"
    facts = ", ".join(
        f"{budget} (alone down to {budget.setting(least)})" for budget, least in alone if least is not None
    )
    ways = []
    for budget in budgets:
        least = least_cost(problem, budget.cost, [other for other in budgets if other is not budget])
        if least is not None:
            ways.append(budget.setting(least))
    way_out = f"keep the others and set {' or '.join(ways)}" if ways else "relax at least two of them"
    return f"search.constraint: each budget is within reach, all together are not: {facts}; {way_out}, or widen space"
