"""The training of one group of replacements that fit the device at once: its steps, its curve, its resume points.

Where the parent is dealt over several processes, all of a replica have to go through the same batches, or one would
wait for hidden states that never come. A process that has nothing to learn, or is ahead because its last resume point
is later than the others', runs its blocks all the same and lets the others learn.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed, resume
from distill.config import EngineConfig, OptimConfig, TrainConfig
from distill.engine.base import TensorGroups, micro_batch_size
from distill.metrics import Row, StepMeter
from distill.schedule import learning_rate
from distill.tracking import Tracker
from distill.trainer import FLUSH_EVERY_STEPS, BatchSource
from puzzle.slices import ParentSlice, parent_activations
from puzzle.trainees import HeldOut, Nmse

MAX_SAVING_FRAC = 0.1
"""Share of the time that resume points may take: the training state is several times the parent, a step is short."""

ASSUMED_BYTES_PER_S = 5e8
"""What writing a resume point is taken to do until the first one has shown it."""


@dataclass(frozen=True, kw_only=True)
class BldSettings:
    """What all replacements of one library share."""

    train: TrainConfig
    optim: OptimConfig
    engine: EngineConfig
    batches: BatchSource
    held_out: Tensor
    """Token ids [num_sequences, seq] on which the error before and after is measured."""
    nmse: Nmse = "tensor"
    lr_key: str = "library.optim.lr"
    """Setting behind ``optim.lr``, to be named where training diverges."""
    learns: bool = True
    """False: errors are measured, weights stay those of the init."""

    @property
    def micro_batch(self) -> int:
        """Sequences per forward."""
        return micro_batch_size(self.engine, batch_size=self.train.batch_size, seq_len=self.train.seq_len)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of every replacement."""
        return self.train.num_steps if self.learns else 0


class Learners(Protocol):
    """What is trained side by side from one pass of a parent, each with an error of its own."""

    parent: ParentSlice

    @property
    def state_bytes(self) -> int:
        """Size of :meth:`state_dict`."""

    def step(self, input_ids: Tensor, *, lr: float, micro_batch: int) -> dict[str, Tensor]:
        """One optimizer step on ``input_ids [batch, seq]``; metrics on the device."""

    def held_out(self, sequences: Tensor, *, batch_size: int) -> list[HeldOut]:
        """Errors of each over ``sequences [num_sequences, seq]``."""

    def state_dict(self) -> TensorGroups:
        """Weights and optimizer state."""

    def load_state_dict(self, groups: TensorGroups) -> None:
        """Undo of :meth:`state_dict`."""


class GroupRun:
    """One process's group on its way: where it stands, and what it has logged.

    Args:
        trainees: as initialised, or as the newest resume point in ``resume_dir`` left them.
        settings: of the library.
        resume_dir: private directory of the group's resume points.
        tracker: receives one row per step (median loss over replacements) and per held-out evaluation; None: no one.
        tokens_before: where the group's tokens begin on the curve.
    """

    def __init__(
        self,
        trainees: Learners,
        settings: BldSettings,
        resume_dir: Path,
        tracker: Tracker | None,
        *,
        tokens_before: int,
    ) -> None:
        self.trainees = trainees
        self.curve: list[Row] = []
        self.first_step = 0
        self.init_errors: list[HeldOut] = []
        """On the held-out sequences before training, by replacement."""
        self.errors: list[HeldOut] = []
        """When last measured."""
        self._settings = settings
        self._resume_dir = resume_dir
        self._tracker = tracker
        self._tokens_before = tokens_before
        self._meter = StepMeter(trainees.parent.device, tokens_per_step=settings.train.tokens_per_step)
        seconds = trainees.state_bytes / ASSUMED_BYTES_PER_S
        self._next_save = time.perf_counter() + seconds / MAX_SAVING_FRAC
        point = resume.latest(resume_dir)
        if point is not None:
            trainees.load_state_dict(point.tensors())
            self.first_step = point.step
            self.init_errors = [HeldOut(nmse=nmse, loss=loss) for nmse, loss in point.state["init_errors"]]
            self.curve = point.state["curve"]
            if tracker is not None:
                tracker.restore(self.curve)

    def learn(self, step: int, input_ids: Tensor) -> None:
        """Optimizer step number ``step``, from 0, on ``input_ids [batch, seq]``."""
        settings, train = self._settings, self._settings.train
        tokens = (step + 1) * train.tokens_per_step
        lr = learning_rate(settings.optim, min(1.0, tokens / train.max_tokens))
        metrics = self.trainees.step(input_ids, lr=lr, micro_batch=settings.micro_batch)
        self._meter.add(metrics, tokens=self._tokens_before + tokens, lr=lr)
        if len(self._meter) >= FLUSH_EVERY_STEPS:
            self._flush()

    def evaluate(self, num_steps: int) -> None:
        """Measure all replacements, after ``num_steps`` steps, on the held-out sequences."""
        settings = self._settings
        self._flush()
        self.errors = self.trainees.held_out(settings.held_out, batch_size=settings.micro_batch)
        if not self.init_errors:
            self.init_errors = self.errors
        finite = [error.nmse for error in self.errors if math.isfinite(error.nmse)]
        tokens = self._tokens_before + num_steps * settings.train.tokens_per_step
        self._add({"tokens": tokens, "eval/nmse": statistics.median(finite) if finite else math.nan})
        self._meter.restart()

    def save_if_due(self, num_steps: int) -> None:
        """Write a resume point. Without a cadence of the user's, one that would cost too much time is not written."""
        train = self._settings.train
        due = (
            train.is_due(num_steps, train.resume_every_tokens)
            if train.resume_every_tokens > 0
            else train.is_due(num_steps, train.default_resume_tokens) and time.perf_counter() >= self._next_save
        )
        if not due or num_steps == self._settings.num_steps:
            return
        self._flush()
        started = time.perf_counter()
        init_errors = [(error.nmse, error.loss) for error in self.init_errors]
        state = {"init_errors": init_errors, "curve": self.curve}
        resume.save(
            self._resume_dir, num_steps, tensors=self.trainees.state_dict(), state=state, keep=train.kept_points
        )
        self._next_save = time.perf_counter() + (time.perf_counter() - started) / MAX_SAVING_FRAC
        self._meter.restart()

    def _flush(self) -> None:
        if len(self._meter) > 0:
            for row in self._meter.flush():
                self._add(row)

    def _add(self, row: Row) -> None:
        if not all(map(math.isfinite, row.values())):
            raise ValueError(
                f"none of what learns here has a finite error at {row['tokens']:,} tokens; lower "
                f"{self._settings.lr_key}, or look at the weights of the parent"
            )
        self.curve.append(row)
        if self._tracker is not None:
            self._tracker.log(row)


def run_together(parent: ParentSlice, run: GroupRun | None, settings: BldSettings, *, desc: str) -> None:
    """Train ``run`` to its end, in step with the other processes of its replica; None: nothing of one's own.

    All processes have to call this at once.
    """
    own = None if run is None else run.first_step
    everyones = distributed.gather_objects((parent.replica, own))
    first_steps = [step for replica, step in everyones if replica == parent.replica and step is not None]
    if not first_steps:
        return
    train, start = settings.train, min(first_steps)
    if start == 0:
        _evaluate(parent, run if own == 0 else None, 0, settings)
    bar = tqdm(
        total=settings.num_steps * train.tokens_per_step,
        initial=start * train.tokens_per_step,
        desc=desc,
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=not distributed.is_main(),
    )
    with bar:
        for step in range(start, settings.num_steps):
            learning = run if own is not None and own <= step else None
            batch = settings.batches.batch(step).input_ids
            if learning is not None:
                learning.learn(step, batch)
            else:
                _pass_through(parent, batch, settings)
            last = step + 1 == settings.num_steps
            if last or train.is_due(step + 1, train.eval_every_tokens):
                _evaluate(parent, learning, step + 1, settings)
            if learning is not None:
                learning.save_if_due(step + 1)
            bar.update(train.tokens_per_step)


def _evaluate(parent: ParentSlice, run: GroupRun | None, num_steps: int, settings: BldSettings) -> None:
    if run is not None:
        run.evaluate(num_steps)
    else:
        _pass_through(parent, settings.held_out, settings)


def _pass_through(parent: ParentSlice, input_ids: Tensor, settings: BldSettings) -> None:
    """Run the slice's blocks for the processes after it."""
    for part in input_ids.split(settings.micro_batch):
        for _ in parent_activations(parent, part):
            pass
