"""The laws that recovery curves are fitted with, and the family of fits that their points allow. Torch-free.

    y(t) = floor + amplitude (1 + S(t) / scale)^-exponent + noise r(t)

``r(t)`` is the learning rate as a fraction of its peak, ``S(t)`` the integral of ``r^drag``. Half of the family is the
power law in tokens alone: ``drag`` and ``noise`` are 0. The other half minds the learning rate: while it falls, the
loss loses what the rate's noise added, and progress slows down, between not at all (``drag`` 0) and in proportion (1).
A schedule that is not known is a constant one, where ``noise`` is a part of the floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import least_squares

from distill.config import require
from launch.forecast_curve import Schedule, TrainingCurve

MIN_POINTS = 6
"""Fewest points of a curve that a forecast is made of: the law has four or five parameters."""
NUM_FITS = 100
"""Members of the family."""

PRIOR_MEAN = np.array([math.log(0.5), 0.4, math.log(0.15), math.log(0.02)])
PRIOR_STD = np.array([0.5, 0.4, 0.8, 3.0])
"""What is believed of a curve before it is seen: logarithm of the exponent, floor over the last loss, logarithms of the
noise over the last loss and of the scale over the tokens so far. Wide; it matters where points are few."""
LOWEST = np.array([math.log(0.02), 0.0, math.log(1e-3), math.log(1e-6), -12.0])
HIGHEST = np.array([math.log(4.0), 1.0, 0.0, math.log(1e3), 12.0])
"""Ends of those, and of the logarithm of the amplitude over the first loss."""
SMALLEST_ERROR = 0.015
"""Relative error that a point has at least."""
EARLY_TOKENS_FRAC, EARLY_WEIGHT = 0.05, 4.0
"""Points among the first tokens count less: warm-up, and an optimizer without history, follow no law."""
DRIFT = {"kld": 0.1, "kld_top_k": 0.1, "lm_loss": 0.2, "retained": 0.2}
"""Relative standard deviation of what no law foresees, at e times the tokens of the last point; it grows with the root
of the tokens' logarithm. Set on real runs, checked on others: docs/forecast.md."""
DRIFT_OF_LONGER_RUNS = 0.3
"""The same between the ends of two runs, one e times as long as the other: each has a learning rate of its own at every
token, and what the shorter one tells of the longer one is less."""
LOWEST_LOSS = {"lm_loss": 0.25, "retained": 0.25}
"""How far below the teacher's LM loss the floor may lie, as a share of the gap: training text is news to a student."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """Members of the family, each a row ``[num_fits]`` of parameters, all in nats per token but scale and exponent."""

    floor: np.ndarray
    amplitude: np.ndarray
    scale: np.ndarray
    """Tokens at the peak learning rate."""
    exponent: np.ndarray
    noise: np.ndarray
    """What the peak learning rate adds to the loss; 0 without a schedule."""
    drag: np.ndarray
    """How much a low learning rate slows progress down, 0..1."""

    def loss(self, tokens: np.ndarray, schedule: Schedule | None) -> np.ndarray:
        """``[num_fits, num_points]`` after ``tokens`` of the phase; beyond its budget, at the end of a longer run."""
        times = [_time(tokens, schedule, drag) for drag in self.drag]
        progress, rate = (np.stack(part) for part in zip(*times, strict=True))
        decayed = (1 + progress / self.scale[:, None]) ** -self.exponent[:, None]
        return self.floor[:, None] + self.amplitude[:, None] * decayed + self.noise[:, None] * rate


def _time(tokens: np.ndarray, schedule: Schedule | None, drag: float) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.asarray(tokens, dtype=float)
    if schedule is None:
        return tokens, np.zeros_like(tokens)
    return schedule.progress(tokens, drag), schedule.rate(tokens)


def joined(laws: Sequence[Law]) -> Law:
    """All members of ``laws``."""
    return Law(**{field.name: np.concatenate([getattr(law, field.name) for law in laws]) for field in fields(Law)})


@dataclass(frozen=True, kw_only=True)
class Family:
    """A fitted curve: the best law in tokens alone, and the laws of both kinds that the points allow."""

    best: Law
    members: Law
    error: float
    """Relative scatter of the points about the best law."""
    curve: TrainingCurve
    lowest: float
    """Loss that no floor lies below."""
    drift: np.ndarray
    """``[num_fits]`` standard normal: where each member leaves the law behind the last point."""
    scatter: np.ndarray
    """``[num_fits]`` standard normal: where an evaluation lies beside each member."""

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """``[num_fits, num_points]`` after ``tokens`` of the phase, of the members, which drift off behind the last
        point; beyond the budget, at the end of a longer run of the same schedule."""
        tokens = np.asarray(tokens, dtype=float)
        last, schedule = self.curve.tokens[-1], self.curve.schedule
        known = math.inf if schedule is None else max(schedule.max_tokens, last)
        within = np.log(np.maximum(np.minimum(tokens, known) / last, 1.0))
        beyond = np.log(np.maximum(tokens / known, 1.0))
        spread = np.sqrt(DRIFT[self.curve.metric] ** 2 * within + DRIFT_OF_LONGER_RUNS**2 * beyond)
        drifted = np.exp(self.drift[:, None] * spread)
        return self.lowest + (self.members.loss(tokens, self.curve.schedule) - self.lowest) * drifted

    def points(self, tokens: np.ndarray) -> np.ndarray:
        """:meth:`losses` as evaluations would show them: with the scatter of the points so far."""
        scattered = np.exp(self.error * self.scatter[:, None])
        return self.lowest + (self.losses(tokens) - self.lowest) * scattered

    def floors(self) -> np.ndarray:
        """``[num_fits]`` losses that no number of tokens brings a run of this schedule below."""
        schedule = self.curve.schedule
        if schedule is None:
            return self.members.floor
        return self.members.floor + self.members.noise * schedule.rate(np.array([schedule.max_tokens]))


class _Problem:
    """Least squares of the logarithm of the loss above its lowest value, with the prior as further residuals."""

    def __init__(self, curve: TrainingCurve, *, drag: float, with_noise: bool) -> None:
        self.curve = curve
        self.drag = drag
        gap = curve.reference - curve.teacher
        self.lowest = curve.teacher - LOWEST_LOSS.get(curve.metric, 0.0) * gap
        self.values = curve.values - self.lowest
        self.progress, self.rate = _time(curve.tokens, curve.schedule, drag)
        self.has_noise = with_noise and curve.schedule is not None and np.ptp(self.rate[1:]) > 0
        early = EARLY_TOKENS_FRAC * curve.tokens[-1]
        self.spread = 1 + (EARLY_WEIGHT - 1) * early / (early + curve.tokens)

    def law(self, parameters: np.ndarray) -> Law:
        """Of rows of parameters ``[num_fits, 5]``."""
        log_exponent, floor, log_noise, log_scale, log_amplitude = parameters.T
        last = self.values[-1]
        return Law(
            floor=self.lowest + floor * last,
            amplitude=self.values[0] * np.exp(log_amplitude),
            scale=self.progress[-1] * np.exp(log_scale),
            exponent=np.exp(log_exponent),
            noise=np.exp(log_noise) * last * self.has_noise,
            drag=np.full(len(parameters), self.drag),
        )

    def logs(self, parameters: np.ndarray) -> np.ndarray:
        """Logarithm of the loss above its lowest value at every point."""
        return self._logs_and_slopes(parameters)[0]

    def _logs_and_slopes(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`logs`, and its derivatives ``[num_points, 5]`` by the parameters."""
        law = self.law(parameters[None])
        stretched = self.progress / law.scale
        decayed = law.amplitude * (1 + stretched) ** -law.exponent
        noise = law.noise * self.rate
        loss = law.floor - self.lowest + decayed + noise
        slopes = (
            -decayed * law.exponent * np.log1p(stretched),
            np.full_like(loss, self.values[-1]),
            noise,
            decayed * law.exponent * stretched / (1 + stretched),
            decayed,
        )
        return np.log(loss), np.stack(slopes, axis=1) / loss[:, None]

    def solve(self, start: np.ndarray, logs: np.ndarray, prior: np.ndarray, error: float) -> tuple[np.ndarray, float]:
        """Parameters, and the cost, for points ``logs`` of relative ``error`` and a prior about ``prior``."""
        weight = 1 / (error * self.spread)
        of_prior = np.eye(4, 5) / PRIOR_STD[:, None]

        def residuals(parameters: np.ndarray) -> np.ndarray:
            return np.concatenate([(self.logs(parameters) - logs) * weight, (parameters[:4] - prior) / PRIOR_STD])

        def slopes(parameters: np.ndarray) -> np.ndarray:
            return np.concatenate([self._logs_and_slopes(parameters)[1] * weight[:, None], of_prior])

        start = np.clip(start, LOWEST + 1e-6, HIGHEST - 1e-6)
        found = least_squares(
            residuals,
            start,
            jac=slopes,
            bounds=(LOWEST, HIGHEST),
            x_scale=np.append(PRIOR_STD, 1.0),
            loss="soft_l1",
            max_nfev=60,
        )
        return found.x, float(found.cost)


def fit_family(curve: TrainingCurve, *, num_fits: int = NUM_FITS, seed: int = 0) -> Family:
    """Fit the law in tokens alone from several starts, then both laws in turn to points and priors drawn anew.

    Each member fits the best law's values with residuals of neighbouring points put on them (a moving-block bootstrap),
    and believes in priors drawn from their own distribution (randomised maximum likelihood): the spread of the
    members is what points, priors and the choice between the laws leave open.

    Raises:
        ValueError: fewer than MIN_POINTS, or the loss does not fall.
    """
    check_curve(curve)
    problem = _Problem(curve, drag=0.0, with_noise=False)
    logs = np.log(np.maximum(problem.values, 1e-12))
    error = 0.02
    best = _best_of_starts(problem, logs, error)
    for _ in range(3):
        best, _ = problem.solve(best, logs, PRIOR_MEAN, error)
        residuals = (logs - problem.logs(best)) / problem.spread
        error = max(_scatter(residuals, num_parameters=4), SMALLEST_ERROR)
    generator = np.random.default_rng(seed)
    return Family(
        best=problem.law(best[None]),
        members=_members(problem, best, residuals, error, num_fits=num_fits, generator=generator),
        error=error,
        curve=curve,
        lowest=problem.lowest,
        drift=generator.standard_normal(num_fits),
        scatter=generator.standard_normal(num_fits),
    )


def check_curve(curve: TrainingCurve) -> None:
    """Refuse what no forecast can be made of.

    Raises:
        ValueError: fewer than MIN_POINTS, a loss that does not fall, or none to recover.
    """
    points = len(curve.values)
    way_out = (
        "wait, or let the next run evaluate more often: distill.eval_every_tokens=<a twentieth of distill.max_tokens>"
    )
    require(
        points >= MIN_POINTS,
        f"{curve.step}: the curve of {curve.metric} has {points} points in its last phase, a forecast needs "
        f"{MIN_POINTS}; {way_out}",
    )
    require(
        curve.reference > curve.teacher,
        f"{curve.step}: {curve.metric} starts at {curve.reference:.4g}, not above the teacher's {curve.teacher:.4g}; "
        "there is nothing to recover",
    )
    latest = float(np.median(curve.values[-3:]))
    require(
        latest < curve.reference and latest <= float(np.median(curve.values[1:4])),
        f"{curve.step}: {curve.metric} does not fall over its {points} points ({curve.reference:.4g} at the start, "
        f"{latest:.4g} now); no law of recovery fits; lower optim.lr, or wait until it falls",
    )


def _best_of_starts(problem: _Problem, logs: np.ndarray, error: float) -> np.ndarray:
    starts = []
    for exponent in (0.3, 0.8):
        for floor in (0.0, 0.5, 0.9):
            for scale in (1e-3, 3e-2, 1.0):
                starts.append(np.array([math.log(exponent), floor, math.log(0.1), math.log(scale), 0.0]))
    solutions = [problem.solve(start, logs, PRIOR_MEAN, error) for start in starts]
    return min(solutions, key=lambda solution: solution[1])[0]


def _scatter(residuals: np.ndarray, *, num_parameters: int) -> float:
    """Robust standard deviation, for as many degrees of freedom as are left."""
    freedom = max(len(residuals) - num_parameters, 1)
    return 1.4826 * float(np.median(np.abs(residuals))) * math.sqrt(len(residuals) / freedom)


def _members(
    problem: _Problem,
    best: np.ndarray,
    residuals: np.ndarray,
    error: float,
    *,
    num_fits: int,
    generator: np.random.Generator,
) -> Law:
    fitted = problem.logs(best)
    num_points = len(fitted)
    centred = residuals - residuals.mean()
    spread = centred.std()
    block = max(2, round(num_points ** (1 / 3)))
    members = []
    for number in range(num_fits):
        starts = generator.integers(0, num_points - block + 1, size=-(-num_points // block))
        drawn = np.concatenate([centred[start : start + block] for start in starts])[:num_points]
        # A law with as many parameters as points leaves residuals that are too small.
        drawn = drawn * (error / spread if spread > 0 else 0.0)
        prior = generator.normal(PRIOR_MEAN, PRIOR_STD)
        drag = generator.uniform()
        minds_rate = number % 2 == 1 and problem.curve.schedule is not None
        other = _Problem(problem.curve, drag=drag * minds_rate, with_noise=minds_rate)
        solution, _ = other.solve(best, fitted + drawn * problem.spread, prior, error)
        members.append(other.law(solution[None]))
    return joined(members)
