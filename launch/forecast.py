"""``python -m launch forecast``: tokens that a training step still needs, from its recovery curve. Torch-free."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from distill.config import require
from launch import console
from launch.forecast_curve import METRICS, TrainingCurve, read_training, training_curve
from launch.forecast_fit import Family, fit_family
from launch.quantities import percent, scaled, significant

TARGET = 0.95
LEVEL = 0.8
"""Share of real curves that an interval is meant to hold."""
HORIZON = 100.0
"""Tokens that are looked at, over those so far."""
LABELS = {"kld": "KLD", "kld_top_k": "KLD of the top k", "lm_loss": "LM loss", "retained": "LM loss"}


@dataclass(frozen=True, kw_only=True)
class Range:
    """The middle of the family, and the ends of the interval of LEVEL."""

    middle: float | None
    low: float | None
    high: float | None
    """None: beyond the horizon, or never."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the curve of one training step says of its future. Losses in nats per token."""

    step: str
    metric: str
    state: str
    """finished, running or stopped."""
    num_points: int
    tokens_before: int
    """Training tokens before the phase; all others are counted from there."""
    tokens: int
    """Of the last point."""
    max_tokens: int | None
    """Budget of the phase; None: its schedule is not known."""
    reference: float
    """Loss that recovery is counted from: the phase's first."""
    teacher: float
    loss: float
    """Of the last point."""
    recovered_frac: float
    target: float
    target_loss: float
    end_loss: Range | None
    """What an evaluation at the end of the budget shows; None: it is spent, or not known."""
    end_recovered_frac: Range | None
    floor: Range
    """What no number of tokens brings the loss below."""
    floor_recovered_frac: float
    tokens_to_target: Range
    """Tokens after which the target is reached: within the budget by this run, beyond it by a run of that budget."""
    reached: bool
    """The last points are at the target already."""
    error: float
    """Relative scatter of the points about the best law."""


def check_target(target: float) -> None:
    """Refuse a target that is no share.

    Raises:
        ValueError: it is not within 0..1.
    """
    require(0 < target < 1, f"--target is a share between 0 and 1, got {target}; 0.95 for 95 %")


def make_forecast(family: Family, target: float = TARGET) -> Forecast:
    """The forecast that ``family`` gives for ``target``, a share in 0..1.

    Raises:
        ValueError: the target is not within 0..1.
    """
    check_target(target)
    curve = family.curve
    last, goal = float(curve.tokens[-1]), curve.loss_at(target)
    budget = None if curve.schedule is None else curve.schedule.max_tokens
    ahead = budget is not None and budget > last
    end = family.points(np.array([float(budget)]))[:, 0] if budget is not None and ahead else None
    floors = family.floors()
    reached = bool(np.median(curve.values[-3:]) <= goal)
    crossings = np.full(len(floors), first_below(curve, goal)) if reached else crossing_tokens(family, goal)
    needed = interval(crossings)
    if not reached and np.median(floors) >= goal:
        # Some members drift below it far out, which is no forecast.
        needed = Range(middle=None, low=needed.low, high=None)
    return Forecast(
        step=curve.step,
        metric=curve.metric,
        state=curve.state,
        num_points=len(curve.values),
        tokens_before=curve.tokens_before,
        tokens=int(last),
        max_tokens=budget,
        reference=curve.reference,
        teacher=curve.teacher,
        loss=float(curve.values[-1]),
        recovered_frac=curve.recovered(float(curve.values[-1])),
        target=target,
        target_loss=goal,
        end_loss=None if end is None else interval(end),
        end_recovered_frac=None if end is None else interval(np.array([curve.recovered(loss) for loss in end])),
        floor=interval(floors),
        floor_recovered_frac=curve.recovered(float(np.median(floors))),
        tokens_to_target=needed,
        reached=reached,
        error=family.error,
    )


def first_below(curve: TrainingCurve, loss: float) -> float:
    """Tokens of the first point from which on all points but the last two are at ``loss`` or below."""
    above = np.flatnonzero(curve.values[:-2] > loss)
    return float(curve.tokens[above[-1] + 1 if above.size else 0])


def crossing_tokens(family: Family, loss: float) -> np.ndarray:
    """``[num_fits]`` tokens after which each member is at ``loss``; infinite beyond HORIZON times the tokens so far."""
    last = float(family.curve.tokens[-1])
    grid = last * np.geomspace(1.0, HORIZON, 1 + 160)
    losses = family.losses(grid)
    below = losses <= loss
    found = np.full(len(losses), math.inf)
    for member in np.flatnonzero(below.any(axis=1)):
        index = int(below[member].argmax())
        if index == 0:
            found[member] = last
            continue
        before, after = losses[member, index - 1], losses[member, index]
        share = (before - loss) / (before - after)
        found[member] = grid[index - 1] * (grid[index] / grid[index - 1]) ** share
    return found


def interval(values: np.ndarray) -> Range:
    """Median of ``values`` and the quantiles that enclose LEVEL of them; infinite ones are None."""
    # Nearest members: between a number and infinity there is nothing to interpolate.
    quantiles = np.quantile(values, [0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    middle, low, high = (float(value) if math.isfinite(value) else None for value in quantiles)
    return Range(middle=middle, low=low, high=high)


def run(arguments: Sequence[str]) -> int:
    """``forecast RUN [--target 0.95] [--step NAME] [--metric ...] [--json]``. Returns 0.

    Raises:
        ValueError: there is no curve, or none that a forecast can be made of.
    """
    options = _parser().parse_args(list(arguments))
    check_target(options.target)
    curve = training_curve(read_training(Path(options.run), options.step), options.metric)
    forecast = make_forecast(fit_family(curve), options.target)
    if options.json:
        print(json.dumps(as_json(forecast), indent=2))
    else:
        for line in lines(forecast):
            console.say(escape(line))
    return 0


def as_json(forecast: Forecast) -> dict[str, Any]:
    """``forecast`` as JSON values, with the level of its intervals."""
    return {**asdict(forecast), "interval_level": LEVEL}


def lines(forecast: Forecast) -> list[str]:
    """The forecast in words."""
    label = LABELS[forecast.metric]
    budget = "" if forecast.max_tokens is None else f" of {scaled(forecast.max_tokens)}"
    said = [
        f"{forecast.step} ({forecast.state}): {label} {significant(forecast.loss)} after {scaled(forecast.tokens)}"
        f"{budget} tokens, {percent(forecast.recovered_frac)} {_measure(forecast)} ({forecast.num_points} points)"
    ]
    if forecast.end_loss is not None and forecast.end_recovered_frac is not None:
        said.append(
            f"this run ends at {label} {_range(forecast.end_loss, significant)}, "
            f"{_range(forecast.end_recovered_frac, percent)} {_measure(forecast)}"
        )
    said.append(target_line(forecast))
    said.append(
        f"floor of this schedule: {label} {_range(forecast.floor, significant)}, "
        f"{percent(forecast.floor_recovered_frac)}; intervals are of {LEVEL:.0%}"
    )
    if forecast.max_tokens is None:
        said.append("the learning rates logged are those of no known schedule: its decay is left out of account")
    return said


def target_line(forecast: Forecast) -> str:
    """One sentence on the target."""
    goal = f"{forecast.target:.4g}".rstrip("0").rstrip(".")
    name = f"{100 * float(goal):g} % ({LABELS[forecast.metric]} {significant(forecast.target_loss)})"
    needed = forecast.tokens_to_target
    if forecast.reached and needed.middle is not None:
        return f"{name}: reached after {scaled(needed.middle)} tokens"
    if needed.middle is None:
        floor = f"floor at {_range(forecast.floor, significant)}"
        if forecast.floor.middle is not None and forecast.floor.middle < forecast.target_loss:
            floor = f"beyond {HORIZON:.0f} times the tokens so far; {floor}"
        hope = "" if needed.low is None else f", at best with {scaled(needed.low)} tokens"
        return f"{name}: not reachable: {floor}{hope}"
    more = Range(
        middle=needed.middle - forecast.tokens,
        low=None if needed.low is None else needed.low - forecast.tokens,
        high=None if needed.high is None else needed.high - forecast.tokens,
    )
    if forecast.max_tokens is None:
        return f"{scaled(more.middle)} tokens more reach {name}, interval {_ends(more)}"
    if needed.middle <= forecast.max_tokens:
        return f"{scaled(more.middle)} tokens more of this run reach {name}, interval {_ends(more)}"
    return (
        f"{name}: not within this run's {scaled(forecast.max_tokens)} tokens; a run of {scaled(needed.middle)} tokens "
        f"with the same schedule ends there, interval {_ends(needed)}"
    )


def _measure(forecast: Forecast) -> str:
    return "of the teacher's perplexity" if forecast.metric == "retained" else "recovered"


def _range(values: Range, written: Any) -> str:
    return f"{written(values.middle)} ({_ends(values, written)})"


def _ends(values: Range, written: Any = scaled) -> str:
    low, high = (end if end is None else written(end) for end in (values.low, values.high))
    return f"{low} to {high}" if high is not None else f"{low} to out of reach"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch forecast",
        description="Tokens that a distillation still needs for a target, from its recovery curve so far.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run directory, the directory of one step, or its metrics.jsonl")
    parser.add_argument("--target", type=float, default=TARGET, help=f"share to be recovered (default {TARGET})")
    parser.add_argument("--step", help="training step of the run (default: the last one with a curve)")
    parser.add_argument("--metric", choices=METRICS, help="loss to forecast (default: the first that was logged)")
    parser.add_argument("--json", action="store_true", help="print the forecast as JSON")
    return parser
