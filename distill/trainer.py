"""The training loop: one for every stage, engine and objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import resume
from distill.config import EngineConfig, OptimConfig, TrainConfig
from distill.engine.base import Engine, create_engine
from distill.metrics import Row, StepMeter
from distill.objective import Objective
from distill.optim import learning_rate
from distill.tracking import Tracker

FLUSH_EVERY_STEPS = 10
"""Steps between reads of metrics from the device. Each read waits for it; a loss that is not finite shows only then."""


class BatchSource(Protocol):
    """Batches as a pure function of the step, so that a resumed run sees the same data."""

    def batch(self, step: int) -> Tensor:
        """Token ids [batch, seq] of optimizer step ``step``."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training run says of itself."""

    tokens: int
    """Training tokens consumed, those before an interruption included."""
    metrics: Row
    """The last value of every metric."""
    curve: list[Row]
    """All rows in order: one per step, one per evaluation."""

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """Held-out metrics from the first evaluation to the last."""
        rows = (
            {name.removeprefix("eval/"): row[name] for name in row if name.startswith("eval/")} for row in self.curve
        )
        return [row for row in rows if row]


def train(
    *,
    model: nn.Module,
    objective: Objective,
    batches: BatchSource,
    train: TrainConfig,
    optim: OptimConfig,
    engine: EngineConfig,
    seed: int,
    resume_dir: Path,
    tracker: Tracker,
    evaluate: Callable[[], dict[str, float]] | None,
    tokens_before: int = 0,
    desc: str,
) -> TrainResult:
    """Train ``model`` in place until the token budget is spent, going on from the newest resume point if there is one.

    A finished run leaves a last resume point, so calling this again returns the same result without a step.

    Args:
        model: student with fp32 parameters.
        objective: loss of one micro-batch.
        batches: batches of ``train.batch_size`` sequences of ``train.seq_len``.
        train: budget and cadence.
        optim: optimizer and learning rate.
        engine: engine, device, precision.
        seed: of torch's generators at the first step.
        resume_dir: private directory of this run's resume points.
        tracker: receives every row, those of the resume point included.
        evaluate: held-out metrics of the model as it stands; called at the start, every ``train.eval_every_tokens`` and
            at the end, in eval mode and the engine's precision.
        tokens_before: tokens of earlier phases, added to the curve's x.
        desc: label of the progress bar and of errors.

    Raises:
        ValueError: a metric is not finite, or a resume point could not be written.
    """
    torch.manual_seed(seed)
    runner = create_engine(model=model, objective=objective, optim=optim, engine=engine)
    run = _Run(
        runner=runner,
        train=train,
        resume_dir=resume_dir,
        tracker=tracker,
        evaluate=evaluate,
        tokens_before=tokens_before,
        desc=desc,
    )
    first_step = run.start()
    with tqdm(
        total=train.num_steps * train.tokens_per_step,
        initial=first_step * train.tokens_per_step,
        desc=desc,
        unit="tok",
        unit_scale=True,
        leave=False,
    ) as bar:
        for step in range(first_step, train.num_steps):
            tokens = (step + 1) * train.tokens_per_step
            lr = learning_rate(optim, min(1.0, tokens / train.max_tokens))
            run.meter.add(runner.step(batches.batch(step), lr=lr), tokens=tokens_before + tokens, lr=lr)
            bar.update(train.tokens_per_step)
            run.after_step(step + 1, bar)
    return TrainResult(tokens=train.num_steps * train.tokens_per_step, metrics=_last_values(run.curve), curve=run.curve)


class _Run:
    """The curve of one training run, and what happens between its steps."""

    def __init__(
        self,
        *,
        runner: Engine,
        train: TrainConfig,
        resume_dir: Path,
        tracker: Tracker,
        evaluate: Callable[[], dict[str, float]] | None,
        tokens_before: int,
        desc: str,
    ) -> None:
        self.meter = StepMeter(runner.device, tokens_per_step=train.tokens_per_step)
        self.curve: list[Row] = []
        self._runner = runner
        self._train = train
        self._resume_dir = resume_dir
        self._tracker = tracker
        self._evaluate = evaluate
        self._tokens_before = tokens_before
        self._desc = desc
        self._last_point: Path | None = None

    def start(self) -> int:
        """Restore the newest resume point, or evaluate the model as it comes. Returns the first step to run."""
        point = resume.latest(self._resume_dir)
        if point is None:
            self._add_evaluation(step=0)
        else:
            self._runner.load_state_dict(point.tensors())
            self.curve = point.state["curve"]
            self._tracker.restore(self.curve)
            self._last_point = point.directory
        self.meter.restart()
        return 0 if point is None else point.step

    def after_step(self, num_steps_done: int, bar: tqdm) -> None:
        """Read metrics, evaluate and write a resume point where one is due."""
        train = self._train
        last = num_steps_done == train.num_steps
        evaluates = last or train.is_due(num_steps_done, train.eval_every_tokens)
        saves = last or train.is_due(num_steps_done, train.resume_every_tokens or train.default_resume_tokens)
        if len(self.meter) >= FLUSH_EVERY_STEPS or evaluates or saves:
            self._add_steps(self.meter.flush(), num_steps_done)
            bar.set_postfix(loss=f"{self.curve[-1]['train/loss']:.4f}")
        if evaluates:
            self._add_evaluation(step=num_steps_done)
        if saves:
            self._save(num_steps_done)
        if evaluates or saves:
            self.meter.restart()

    def _add_steps(self, rows: list[Row], num_steps_done: int) -> None:
        for step, row in enumerate(rows, start=num_steps_done - len(rows) + 1):
            self._add(row, step)

    def _add_evaluation(self, *, step: int) -> None:
        if self._evaluate is None:
            return
        with self._runner.evaluation():
            metrics = self._evaluate()
        tokens = self._tokens_before + step * self._train.tokens_per_step
        self._add({"tokens": tokens, **{f"eval/{name}": value for name, value in metrics.items()}}, step)

    def _add(self, row: Row, step: int) -> None:
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{self._desc}: {name} is {value} at step {step} ({row['tokens']:,} tokens); last good resume "
                    f"point: {self._last_point or 'none'}; lower optim.lr, or look at the weights that it started from"
                )
        self.curve.append(row)
        self._tracker.log(row)

    def _save(self, num_steps_done: int) -> None:
        tokens = num_steps_done * self._train.tokens_per_step
        self._last_point = resume.save(
            self._resume_dir,
            num_steps_done,
            tensors=self._runner.state_dict(),
            state={"step": num_steps_done, "tokens": tokens, "curve": self.curve},
        )


def _last_values(curve: Iterable[Row]) -> Row:
    merged: Row = {}
    for row in curve:
        merged |= row
    return merged
