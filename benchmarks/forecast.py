"""How good the recovery forecast is on real curves: it sees the first part of each, and is held against the rest.

    python benchmarks/forecast.py OUT CURVE... [--set-on NAME ...]

A CURVE is a run directory, the directory of one step, a ``metrics.jsonl``, or a ``recovery.csv`` of
``benchmarks/collect.py`` (whose schedule is taken for the default one, over its tokens); ``NAME=PATH`` names it. Every
curve is fitted on its first 30, 50 and 70 % of points, and asked for the loss at its end and for the tokens that bring
the loss two thirds into what was held back. Where two runs differ in their budget alone, the whole shorter one is asked
for the longer one's end. Beside the forecast stand the power law in tokens alone, a straight line through
the logarithms of loss and tokens, and the last loss carried forward.

``--set-on``: curves that the constants of ``launch/forecast_fit.py`` were set on; they are summed up apart.
``OUT/forecast.json`` has every number, ``OUT/forecast.md`` the tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.config import OptimConfig
from launch.config import compose_stage
from launch.forecast import LEVEL, crossing_tokens, first_below, interval
from launch.forecast_curve import Schedule, TrainingCurve, read_training, training_curve
from launch.forecast_fit import MIN_POINTS, fit_family
from launch.provenance import provenance
from launch.stage_configs import DistillStage

FRACS = (0.3, 0.5, 0.7)
BUDGET_KEYS = {"max_tokens", "eval_every_tokens", "resume_every_tokens", "resume_points", "data_end"}
"""What runs may differ in and still be one run of two lengths."""
METHODS = ("forecast", "tokens alone", "log-log line", "last loss")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One curve, cut."""

    curve: str
    metric: str
    set_on: bool
    """The program's constants were set on this curve."""
    seen_frac: float
    num_points: int
    """That were seen."""
    seen_tokens: int
    end_tokens: int
    true_loss: float
    """At the end."""
    predicted: dict[str, float]
    """By method."""
    recovered_error: dict[str, float]
    """Recovered fraction, predicted minus true, by method."""
    low: float
    high: float
    covered: bool
    """The interval of the forecast holds the true loss."""
    target_loss: float | None
    """None: a longer run is asked for, not a tail."""
    true_tokens: float | None
    predicted_tokens: dict[str, float | None]
    """None: never."""
    tokens_covered: bool | None


@dataclass(frozen=True, kw_only=True)
class Named:
    """A curve with what it came from."""

    name: str
    curve: TrainingCurve
    config: dict[str, Any]


def read_curves(argument: str) -> Iterator[Named]:
    name, _, path = argument.rpartition("=")
    place = Path(path)
    name = name or (place.parent.name if place.is_file() else place.name)
    if place.suffix == ".csv":
        yield Named(name=name, curve=_of_csv(place, name), config={})
        return
    training = read_training(place)
    for metric in ("kld", "lm_loss"):
        if any(f"eval/{metric}" in row for row in training.rows):
            yield Named(name=name, curve=training_curve(training, metric), config=dict(training.config))


def _of_csv(path: Path, name: str) -> TrainingCurve:
    """KLD of the first step in the file."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["eval/kld"]]
    rows = [row for row in rows if row["step"] == rows[0]["step"]]
    tokens = np.array([float(row["tokens"]) for row in rows])
    optim: OptimConfig = compose_stage(DistillStage, []).optim
    return TrainingCurve(
        step=name,
        metric="kld",
        tokens_before=int(tokens[0]),
        tokens=tokens - tokens[0],
        values=np.array([float(row["eval/kld"]) for row in rows]),
        teacher=0.0,
        schedule=Schedule(optim=optim, max_tokens=int(tokens[-1] - tokens[0])),
        state="finished",
    )


def line_of(curve: TrainingCurve) -> tuple[float, float]:
    """Slope and constant of log(loss) over log(tokens), the first point left out."""
    slope, constant = np.polyfit(np.log(curve.tokens[1:]), np.log(curve.values[1:]), 1)
    return float(slope), float(constant)


def trial_of(
    named: Named, seen: TrainingCurve, *, seen_frac: float, tail: bool, end: TrainingCurve, set_on: bool
) -> Trial:
    """The forecast from ``seen`` against the last point of ``end``, and within it where it is ``seen``'s own tail."""
    end_tokens, true_loss = float(end.tokens[-1]), float(end.values[-1])
    family, plain = fit_family(seen), fit_family(replace(seen, schedule=None))
    slope, constant = line_of(seen)
    losses = family.points(np.array([end_tokens]))[:, 0]
    middle = interval(losses)
    predicted = {
        "forecast": middle.middle,
        "tokens alone": float(np.median(plain.losses(np.array([end_tokens]))[:, 0])),
        "log-log line": math.exp(constant + slope * math.log(end_tokens)),
        "last loss": float(seen.values[-1]),
    }
    target_loss = true_tokens = covered = None
    tokens: dict[str, float | None] = {}
    if tail:
        num = len(seen.values)
        target_loss = float(end.values[num + 2 * (len(end.values) - num) // 3])
        true_tokens = first_below(end, target_loss)
        crossings = interval(crossing_tokens(family, target_loss))
        tokens = {
            "forecast": crossings.middle,
            "tokens alone": interval(crossing_tokens(plain, target_loss)).middle,
            "log-log line": math.exp((math.log(target_loss) - constant) / slope),
            "last loss": None,
        }
        covered = (crossings.low or math.inf) <= true_tokens <= (crossings.high or math.inf)
    return Trial(
        curve=named.name,
        metric=seen.metric,
        set_on=set_on,
        seen_frac=seen_frac,
        num_points=len(seen.values),
        seen_tokens=int(seen.tokens[-1]),
        end_tokens=int(end_tokens),
        true_loss=true_loss,
        predicted=predicted,
        recovered_error={name: seen.recovered(loss) - seen.recovered(true_loss) for name, loss in predicted.items()},
        low=middle.low,
        high=middle.high,
        covered=middle.low <= true_loss <= middle.high,
        target_loss=target_loss,
        true_tokens=true_tokens,
        predicted_tokens=tokens,
        tokens_covered=covered,
    )


def tails(named: Sequence[Named], set_on: Sequence[str], refused: list[str]) -> Iterator[Trial]:
    """The first parts of every curve; why one has no forecast goes to ``refused``."""
    for item in named:
        for frac in FRACS:
            num_points = round(frac * (len(item.curve.values) - 1)) + 1
            if num_points < MIN_POINTS:
                continue
            seen = item.curve.first(num_points)
            try:
                yield trial_of(item, seen, seen_frac=frac, tail=True, end=item.curve, set_on=item.name in set_on)
            except ValueError as error:
                refused.append(f"{item.name}, {seen.metric}, {frac:.0%}: {error}")


def longer_runs(named: Sequence[Named], set_on: Sequence[str]) -> Iterator[Trial]:
    """Pairs of runs that differ in their budget, and in how often they were evaluated, alone."""
    for short in named:
        for long in named:
            same = short.config and _without_budget(short.config) == _without_budget(long.config)
            if (
                same
                and short.curve.metric == long.curve.metric
                and long.curve.tokens[-1] > 1.2 * short.curve.tokens[-1]
            ):
                frac = float(short.curve.tokens[-1] / long.curve.tokens[-1])
                trial = trial_of(
                    short, short.curve, seen_frac=frac, tail=False, end=long.curve, set_on=long.name in set_on
                )
                yield replace(trial, curve=f"{short.name} to {long.name}")


def _without_budget(config: dict[str, Any]) -> dict[str, Any]:
    distill = {key: value for key, value in config.get("distill", {}).items() if key not in BUDGET_KEYS}
    return {**config, "distill": distill}


def table(trials: Sequence[Trial], *, tokens: bool) -> list[str]:
    """One row per metric, seen share and kind of curve."""
    said = ["| loss | seen | curves | " + " | ".join(METHODS) + f" | in the {LEVEL:.0%} interval |", "|" + "---|" * 8]
    groups = sorted({(trial.set_on, trial.metric, trial.seen_frac) for trial in trials})
    for set_on, metric, frac in groups:
        rows = [t for t in trials if (t.set_on, t.metric, t.seen_frac) == (set_on, metric, frac)]
        cells = [_tokens_cell(rows, name) if tokens else _loss_cell(rows, name) for name in METHODS]
        held = sum(bool(row.tokens_covered if tokens else row.covered) for row in rows)
        kind = f"{len(rows)}{' (constants were set on them)' if set_on else ''}"
        said.append(f"| {metric} | {frac:.0%} | {kind} | {' | '.join(cells)} | {held} of {len(rows)} |")
    return said


def _loss_cell(rows: Sequence[Trial], name: str) -> str:
    return f"{100 * float(np.mean([abs(row.recovered_error[name]) for row in rows])):.1f}"


def _tokens_cell(rows: Sequence[Trial], name: str) -> str:
    found = [(row.predicted_tokens[name], row.true_tokens) for row in rows]
    if any(tokens is None for tokens, _ in found):
        return f"never in {sum(tokens is None for tokens, _ in found)}"
    factor = math.exp(float(np.median([abs(math.log(tokens / true)) for tokens, true in found if tokens and true])))
    return f"{factor:.2f}x"


def each(trials: Sequence[Trial]) -> list[str]:
    said = [
        "| curve | loss | seen | true end | forecast | interval | last loss | true tokens | forecast |",
        "|" + "---|" * 9,
    ]
    for trial in trials:
        tokens = trial.predicted_tokens.get("forecast")
        cells = (
            trial.curve,
            trial.metric,
            f"{trial.seen_frac:.0%} of {trial.end_tokens:,}",
            f"{trial.true_loss:.4f}",
            f"{trial.predicted['forecast']:.4f}",
            f"{trial.low:.4f} to {trial.high:.4f}{'' if trial.covered else ' (out)'}",
            f"{trial.predicted['last loss']:.4f}",
            "" if trial.true_tokens is None else f"{trial.true_tokens:,.0f}",
            "" if tokens is None else f"{tokens:,.0f}",
        )
        said.append(f"| {' | '.join(cells)} |")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("curves", nargs="+")
    parser.add_argument("--set-on", nargs="*", default=[])
    options = parser.parse_args()
    named = [item for argument in options.curves for item in read_curves(argument)]
    refused: list[str] = []
    tail, longer = [*tails(named, options.set_on, refused)], [*longer_runs(named, options.set_on)]
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "provenance": provenance(seed=0),
        "level": LEVEL,
        "tails": [asdict(trial) for trial in tail],
        "refused": refused,
        "longer_runs": [asdict(trial) for trial in longer],
        "curves": [
            {
                "name": item.name,
                "metric": item.curve.metric,
                "tokens": item.curve.tokens.tolist(),
                "values": item.curve.values.tolist(),
                "schedule": None if item.curve.schedule is None else asdict(item.curve.schedule),
            }
            for item in named
        ],
    }
    (options.out / "forecast.json").write_text(json.dumps(document, indent=1) + "\n")
    held = [trial.covered for trial in tail if not trial.set_on]
    said = [
        "Mean error of the recovered fraction at the end of the run, in percentage points:",
        "",
        *table(tail, tokens=False),
        "",
        "Tokens to a loss two thirds into what was held back, predicted over true or true over predicted, median:",
        "",
        *table(tail, tokens=True),
        "",
        f"{sum(held)} of {len(held)} ends of curves that no constant was set on lie in their {LEVEL:.0%} interval.",
        "",
        "The end of a longer run, from the whole of a shorter one:",
        "",
        *each(longer),
        "",
        "Every curve:",
        "",
        *each(tail),
        *(["", "No forecast:", "", *(f"- {reason}" for reason in refused)] if refused else []),
    ]
    (options.out / "forecast.md").write_text("\n".join(said) + "\n")
    print("\n".join(said))


if __name__ == "__main__":
    main()
