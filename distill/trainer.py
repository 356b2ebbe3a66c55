"""The training loop: one for every stage, engine and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed, resume
from distill.config import OptimConfig, TrainConfig
from distill.data.batch import Batch
from distill.engine.base import Engine
from distill.metrics import Row, StepMeter
from distill.nonfinite import first_not_finite
from distill.point_writer import PointWriter
from distill.schedule import learning_rate
from distill.tracking import Tracker

FLUSH_EVERY_STEPS = 10
"""Steps between reads of metrics from the device. Each read waits for it; a loss that is not finite shows only then."""


class BatchSource(Protocol):
    """Batches as a pure function of the step, so that a resumed run sees the same data at any number of ranks."""

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """Data rank ``rank``'s equal share, in order, of the sequences of optimizer step ``step``, on the CPU."""

    def describe_step(self, step: int) -> str:
        """Where a user finds the text of optimizer step ``step``, in words."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training run says of itself."""

    tokens: int
    """Training tokens consumed, those before an interruption included; fewer than the budget of a run that was asked to
    stop."""
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


@distributed.limited(distributed.TIMEOUT)
def train(
    engine: Engine,
    *,
    batches: BatchSource,
    train: TrainConfig,
    optim: OptimConfig,
    seed: int,
    resume_dir: Path,
    tracker: Tracker | None,
    held_out: Tensor | Batch | None,
    tokens_before: int = 0,
    desc: str,
    should_stop: Callable[[], bool] = lambda: False,
    step_s_at_peak: float | None = None,
) -> TrainResult:
    """Train until the token budget is spent, going on from the newest resume point if there is one.

    Every process calls it. A finished run leaves a last resume point, so calling this again returns the same result
    without a step. Resume points are on disk when it returns or raises.

    Args:
        engine: holds the student, and whatever it is compared with.
        batches: batches of ``train.batch_size`` sequences of ``train.seq_len``.
        train: budget and cadence.
        optim: learning rate.
        seed: of torch's generators at the first step, on data rank 0; the others' follow it.
        resume_dir: private directory of this run's resume points, which all processes share.
        tracker: receives every row, those of the resume point included; in the first process, None in the others.
        held_out: sequences (token ids [num_sequences, seq], or a batch) that the student is evaluated on at the start,
            every ``train.eval_every_tokens`` and at the end; None: never.
        tokens_before: tokens of earlier phases, added to the curve's x.
        desc: label of the progress bar and of errors.
        should_stop: asked after every step, in all processes, with one answer. Where it says so, a resume point is
            written and the run ends early.
        step_s_at_peak: seconds of an optimizer step at the devices' peak rate, of which the curve then has the share
            that is reached (``perf/mfu_frac``); None: not known.

    Raises:
        SharedError: a metric is not finite; in all processes, at the same step.
        ValueError: a resume point could not be written or loaded.
    """
    torch.manual_seed(seed + engine.data_rank)
    with PointWriter(resume_dir, keep=train.kept_points, background=train.resume_points.background) as points:
        run = _Run(
            engine=engine,
            batches=batches,
            train=train,
            resume_dir=resume_dir,
            points=points,
            tracker=tracker,
            held_out=held_out,
            tokens_before=tokens_before,
            desc=desc,
            should_stop=should_stop,
            step_s_at_peak=step_s_at_peak,
        )
        num_steps_done = first_step = run.start()
        with tqdm(
            total=train.spent_tokens,
            initial=first_step * train.tokens_per_step,
            desc=desc,
            unit="tok",
            unit_scale=True,
            leave=False,
        ) as bar:
            for step in range(first_step, train.num_steps):
                tokens = (step + 1) * train.tokens_per_step
                lr = learning_rate(optim, min(1.0, tokens / train.max_tokens))
                metrics = engine.step(batches.batch(step, engine.data_rank, engine.num_data_ranks), lr=lr)
                run.meter.add(metrics, tokens=tokens_before + tokens, lr=lr)
                bar.update(train.tokens_per_step)
                num_steps_done = step + 1
                if run.after_step(num_steps_done, bar):
                    break
    return TrainResult(tokens=num_steps_done * train.tokens_per_step, metrics=_last_values(run.curve), curve=run.curve)


class _Run:
    """The curve of one training run, and what happens between its steps."""

    def __init__(
        self,
        *,
        engine: Engine,
        batches: BatchSource,
        train: TrainConfig,
        resume_dir: Path,
        points: PointWriter,
        tracker: Tracker | None,
        held_out: Tensor | Batch | None,
        tokens_before: int,
        desc: str,
        should_stop: Callable[[], bool],
        step_s_at_peak: float | None,
    ) -> None:
        self.meter = StepMeter(engine.device, tokens_per_step=train.tokens_per_step, step_s_at_peak=step_s_at_peak)
        self.curve: list[Row] = []
        self._engine = engine
        self._batches = batches
        self._train = train
        self._resume_dir = resume_dir
        self._points = points
        self._tracker = tracker
        self._held_out = held_out
        self._tokens_before = tokens_before
        self._desc = desc
        self._should_stop = should_stop

    def start(self) -> int:
        """Restore the newest resume point, or evaluate the model as it comes. Returns the first step to run."""
        point = resume.latest_together(self._resume_dir)
        if point is None:
            self._add_evaluation(step=0)
        else:
            resume.load_together(point, self._engine.load)
            self.curve = point.state["curve"]
            if self._tracker is not None:
                self._tracker.restore(self.curve)
            self._points.found(point.directory)
        self.meter.restart()
        return 0 if point is None else point.step

    def after_step(self, num_steps_done: int, bar: tqdm) -> bool:
        """Read metrics, evaluate and write a resume point where one is due. Returns whether the run is to stop."""
        self._points.check()
        train = self._train
        last = num_steps_done == train.num_steps
        evaluates = last or train.is_due(num_steps_done, train.eval_every_tokens)
        stops = not last and self._should_stop()
        saves = last or stops or train.is_due(num_steps_done, train.resume_every_tokens or train.default_resume_tokens)
        if len(self.meter) >= FLUSH_EVERY_STEPS or evaluates or saves:
            self._add_steps(self.meter.flush(), num_steps_done)
            bar.set_postfix(loss=f"{self.curve[-1]['train/loss']:.4f}")
        if evaluates:
            self._add_evaluation(step=num_steps_done)
        if saves:
            self._save(num_steps_done, waits=last or stops)
        if evaluates or saves:
            self.meter.restart()
        return stops

    def _add_steps(self, rows: list[Row], num_steps_done: int) -> None:
        first_step = num_steps_done - len(rows)
        self._add(rows, first_step + 1, describe_step=lambda row: self._batches.describe_step(first_step + row))

    def _add_evaluation(self, *, step: int) -> None:
        if self._held_out is None:
            return
        held_out = self._held_out
        metrics = self._engine.evaluate(held_out)
        tokens = self._tokens_before + step * self._train.tokens_per_step
        row = {"tokens": tokens, **{f"eval/{name}": value for name, value in metrics.items()}}
        self._add([row], step, describe_step=lambda _: f"the {len(held_out)} held-out sequences")

    def _add(self, rows: list[Row], step: int, *, describe_step: Callable[[int], str]) -> None:
        """Add rows, the first of which is of ``step``; ``describe_step`` says of which text a row is."""
        bad = first_not_finite(rows)
        for row in rows if bad is None else rows[: bad.row]:
            self.curve.append(row)
            if self._tracker is not None:
                self._tracker.log(row)
        if bad is not None:
            raise bad.error(
                desc=self._desc,
                step=step + bad.row,
                tokens=rows[bad.row]["tokens"],
                read=describe_step(bad.row),
                point=self._points.last_committed(),
            )

    def _save(self, num_steps_done: int, *, waits: bool) -> None:
        tokens = num_steps_done * self._train.tokens_per_step
        # The list grows while it is written, its rows do not change.
        state = {"step": num_steps_done, "tokens": tokens, "curve": list(self.curve)}
        self._points.save(num_steps_done, self._engine, state, waits=waits)


def _last_values(curve: Iterable[Row]) -> Row:
    merged: Row = {}
    for row in curve:
        merged |= row
    return merged
