"""Where a training step's recovery curve lies, and what is known of it: points, schedule, teacher. Torch-free."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dacite
import numpy as np
import yaml

from distill.config import OptimConfig, require
from distill.recovered import gap_closed_frac, retained_frac
from distill.schedule import learning_rate
from launch.artifact import MANIFEST_NAME
from launch.recovery import TRAINING_STAGES

METRICS_FILE = "metrics.jsonl"
METRICS = ("kld", "kld_top_k", "lm_loss", "retained")
"""Names of what may be forecast, the preferred one first. ``retained`` is the LM loss with another target."""
GRID = 1024
"""Intervals of the learning rate's integral over a token budget."""

Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over one phase of training."""

    optim: OptimConfig
    max_tokens: int
    """Budget of the phase, where the rate reaches its end; beyond, it stays there."""

    def rate(self, tokens: np.ndarray) -> np.ndarray:
        """Learning rate as a fraction of its peak, ``[num_points]``, after ``tokens`` of the phase.

        Beyond the budget it is what a longer run of the same schedule ends with.
        """
        fracs = np.minimum(np.asarray(tokens, dtype=float) / self.max_tokens, 1.0)
        return np.array([learning_rate(self.optim, frac) for frac in fracs]) / self.optim.lr

    def progress(self, tokens: np.ndarray, drag: float) -> np.ndarray:
        """Integral of :meth:`rate` to the power ``drag``: what ``tokens`` are worth in tokens at the peak rate.

        Beyond the budget it is that of a whole run of so many tokens with the same schedule.
        """
        fracs = np.asarray(tokens, dtype=float) / self.max_tokens
        grid = np.linspace(0.0, 1.0, GRID + 1)
        rates = self.rate(grid * self.max_tokens) ** drag
        steps = (rates[1:] + rates[:-1]) / (2 * GRID)
        inside = np.interp(fracs, grid, np.concatenate([[0.0], np.cumsum(steps)]))
        return self.max_tokens * inside * np.maximum(fracs, 1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """One held-out loss over the last phase of one training step."""

    step: str
    """Name of the step, or of the file's directory."""
    metric: str
    """One of METRICS."""
    tokens_before: int
    """Training tokens before the phase, along the student's line."""
    tokens: np.ndarray
    """``[num_points]`` tokens of the phase, rising, the first one 0."""
    values: np.ndarray
    """``[num_points]`` nats per token."""
    teacher: float
    """What the loss is where nothing is missing: 0 for a divergence, the teacher's LM loss."""
    schedule: Schedule | None
    """None: not known, and time is tokens."""
    state: str
    """finished, running or stopped."""

    @property
    def reference(self) -> float:
        """What recovery is counted from: the loss at the phase's start."""
        return float(self.values[0])

    def loss_at(self, target: float) -> float:
        """Loss where the share ``target`` is recovered: of the gap, or of the teacher's perplexity (``retained``)."""
        if self.metric == "retained":
            return self.teacher - math.log(target)
        return self.reference - target * (self.reference - self.teacher)

    def recovered(self, loss: float) -> float:
        """Inverse of :meth:`loss_at`."""
        if self.metric == "retained":
            return retained_frac(teacher=self.teacher, student=loss)
        closed = gap_closed_frac(parent=self.teacher, reference=self.reference, model=loss)
        assert closed is not None, "a curve that starts at the teacher's loss is fitted by nothing"
        return closed

    def first(self, num_points: int) -> TrainingCurve:
        """What the curve was when it had ``num_points``."""
        return replace(self, tokens=self.tokens[:num_points], values=self.values[:num_points])


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """What one training step has logged so far."""

    step: str
    rows: Sequence[Row]
    config: Mapping[str, Any]
    """Resolved configuration of the step; empty: not known."""
    state: str


def read_training(path: Path, step: str | None = None) -> TrainingRows:
    """Rows of a training step: of a run (finished, going on or stopped), of an artifact or of a ``metrics.jsonl``.

    Args:
        path: run directory, directory of one step, or the file.
        step: which step of a run; None: the last one that has logged held-out losses beside a teacher.

    Raises:
        ValueError: there is nothing of the kind.
    """
    file = path if path.is_file() else path / METRICS_FILE
    if file.is_file():
        require(step is None, f"{path} is one step; leave out --step {step}, or name the run directory")
        return _read_step(file, step=file.resolve().parent.name)
    steps = list(_steps_of_run(path))
    require(
        bool(steps),
        f"{path} is not a run with a training step: it has neither config.yaml nor {METRICS_FILE}; name a directory "
        f"under run.root, a step's directory, or a {METRICS_FILE} (of a step that runs: "
        f"{path.parent}/store/.unfinished/*/{METRICS_FILE})",
    )
    names = [name for name, _, _ in steps]
    require(step is None or step in names, f"{path} has no training step {step!r}; it has {', '.join(names)}")
    wanted = [place for place in steps if step in (None, place[0])]
    found = [rows for place in wanted if (rows := _find_rows(path, *place))]
    with_losses = [rows for rows in found if any("eval/lm_loss" in row for row in rows.rows)]
    require(
        bool(with_losses),
        f"no held-out loss yet of {step or ', '.join(names)} in {path}; wait for the first evaluation",
    )
    # A context extension on text alone has no teacher, and nothing to come back to.
    beside_teacher = [rows for rows in with_losses if any(_has(rows.rows, metric) for metric in METRICS)]
    return (beside_teacher or with_losses)[-1]


def _steps_of_run(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name, directory name in the store and configuration of a run's training steps, in order."""
    file = path / "config.yaml"
    if not file.is_file():
        for link in sorted(path.iterdir()) if path.is_dir() else ():
            if (link / METRICS_FILE).is_file() and link.resolve().name.rpartition("-")[0] in TRAINING_STAGES:
                yield link.name, link.resolve().name, {}
        return
    document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for name, step in document.get("steps", {}).items():
        if step["stage"] in TRAINING_STAGES:
            yield name, f"{step['stage']}-{step['fingerprint'][:16]}", step["config"]


def _find_rows(run: Path, name: str, directory: str, config: Mapping[str, Any]) -> TrainingRows | None:
    """Rows of a step: committed, being written, or in the newest resume point."""
    store = run.parent / "store"
    for place in (run / name, store / directory, store / ".unfinished" / directory):
        # A link may still point at what an earlier run of this name had.
        if place.resolve().name == directory and (place / METRICS_FILE).is_file():
            return _read_step(place / METRICS_FILE, step=name, config=config)
    states = sorted((store / ".resume" / directory).rglob("state.json"), key=lambda file: file.stat().st_mtime)
    if not states:
        return None
    curve = json.loads(states[-1].read_text(encoding="utf-8"))["curve"]
    return TrainingRows(step=name, rows=curve, config=config, state="stopped")


def _read_step(file: Path, *, step: str, config: Mapping[str, Any] | None = None) -> TrainingRows:
    manifest = file.parent / MANIFEST_NAME
    if manifest.is_file():
        config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    rows = []
    lines = file.read_text(encoding="utf-8").split("\n")
    # What stands behind the last line end is a row that is being written.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}:{number} is not a JSON object; damaged, remove it and run the step again"
            ) from error
    return TrainingRows(
        step=step, rows=rows, config=config or {}, state="finished" if manifest.is_file() else "running"
    )


def training_curve(training: TrainingRows, metric: str | None = None) -> TrainingCurve:
    """The curve of ``metric`` (None: the first of METRICS that was logged) over the last phase that was begun.

    Held-out sequences have another length in every phase of a context extension, so its phases are curves of their own.

    Raises:
        ValueError: the metric was not logged.
    """
    phase = last_phase(training.rows)
    logged = [name for name in METRICS if _has(phase, name)]
    require(
        bool(logged) and metric in (None, *logged),
        f"{training.step} has logged no {metric or 'held-out loss beside a teacher'}; there is "
        f"{', '.join(logged) or 'none'}: train with a teacher as an input",
    )
    metric = metric or logged[0]
    column = "eval/lm_loss" if metric == "retained" else f"eval/{metric}"
    points = {int(row["tokens"]): row for row in phase if column in row}
    tokens = np.array(list(points), dtype=float)
    last = next(reversed(points.values()))
    schedule = find_schedule(training.config, phase)
    return TrainingCurve(
        step=training.step,
        metric=metric,
        tokens_before=int(tokens[0]),
        tokens=tokens - tokens[0],
        values=np.array([row[column] for row in points.values()]),
        teacher=0.0 if metric.startswith("kld") else float(last["eval/teacher_lm_loss"]),
        schedule=schedule,
        state=training.state,
    )


def _has(rows: Sequence[Row], metric: str) -> bool:
    """Whether ``metric`` was logged with what it is counted from."""
    if metric.startswith("kld"):
        return any(f"eval/{metric}" in row for row in rows)
    return any("eval/teacher_lm_loss" in row for row in rows)


def last_phase(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows from the last first evaluation on: where a phase ends and the next begins, two share a token count."""
    evaluated = [(index, row["tokens"]) for index, row in enumerate(rows) if "eval/lm_loss" in row]
    starts = [index for (_, before), (index, tokens) in itertools.pairwise(evaluated) if tokens == before]
    return rows[starts[-1] :] if starts else rows


def find_schedule(config: Mapping[str, Any], phase: Sequence[Row]) -> Schedule | None:
    """The schedule of ``config`` that gives the learning rates that ``phase`` has logged; None: there is none.

    A budget that the data cut short, and a configuration that is not known, leave none.
    """
    budgets = [config[name]["max_tokens"] for name in ("distill",) if name in config]
    budgets += [item["max_tokens"] for item in config.get("extend_context", {}).get("phases", ())]
    start = next((row["tokens"] for row in phase if "eval/lm_loss" in row), 0)
    logged = [(row["tokens"] - start, row["optim/lr"]) for row in phase if "optim/lr" in row and row["tokens"] > start]
    if not logged or "optim" not in config:
        return None
    optim = dacite.from_dict(OptimConfig, dict(config["optim"]))
    tokens, rates = np.array(logged, dtype=float).T
    for budget in budgets:
        schedule = Schedule(optim=optim, max_tokens=budget)
        if np.allclose(schedule.rate(tokens) * optim.lr, rates, rtol=1e-3):
            return schedule
    return None
