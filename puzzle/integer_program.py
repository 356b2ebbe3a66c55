"""Mixed-integer programs over variables in 0..1 and their solution by HiGHS. Torch-free.

Only variants that may matter are given to the solver: a choice that has a variant of reduced cost r in the linear
relaxation is worth at least the relaxation's optimum plus r. So the solver gets the few variants of small r first, and
again those up to the difference if what it finds is further away. That changes no optimum.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp

OPTIMAL, INFEASIBLE = 0, 2
"""Statuses of ``scipy.optimize.milp`` and ``linprog``."""
ABSOLUTE_GAP = 1e-6
"""At which HiGHS stops."""
CORE_VARIANTS = 3
"""Variants per block, on average, that the solver is given first."""


class TimeLimitError(ValueError):
    """``search.time_limit_seconds`` passed before any choice was found; there may be one."""


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


def minimise(
    program: Program, *, num_blocks: int, num_x: int, relative_gap: float, limit_seconds: float
) -> tuple[np.ndarray, float, bool] | None:
    """Solution, proven bound, and whether the gap was reached in time; None where the program is infeasible.

    Args:
        program: whose first variables choose one variant per block, and whose others follow from them.
        num_blocks: blocks that choose.
        num_x: variables that choose.
        relative_gap: distance to the proven bound at which the solver may stop, relative to the objective.
        limit_seconds: of the whole search.

    Raises:
        TimeLimitError: the time limit passed before any solution was found.
    """
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
    if found is None and result.status != INFEASIBLE:
        raise TimeLimitError(
            f"search.time_limit_seconds={limit_seconds:g} passed before any choice was found ({result.message}); "
            "raise it"
        )
    return found and (found[0], found[1], False)


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
