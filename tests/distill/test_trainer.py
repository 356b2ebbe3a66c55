from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill import resume
from distill.config import (
    EngineConfig,
    ObjectiveConfig,
    OptimConfig,
    ResumePointsConfig,
    TrackingConfig,
    TrainConfig,
)
from distill.data.batch import Batch
from distill.engine.base import create_engine
from distill.engine.setup import ModelProvider, TrainingSetup
from distill.engine.torch_engine import TorchEngine
from distill.point_writer import PointWriter
from distill.tracking import Tracker
from distill.trainer import BatchSource, TrainResult, train

TRAIN = TrainConfig(max_tokens=620, seq_len=8, batch_size=4, eval_every_tokens=256, resume_every_tokens=160)
OPTIM = OptimConfig(lr=5e-3, warmup_frac=0.1)
NUM_STEPS = 20
"""620 tokens in steps of 32: the last step is the first that reaches the budget."""


@dataclass
class Lab:
    """Trains tiny students of one teacher in one directory."""

    provider: Callable[..., ModelProvider]
    batches: BatchSource
    directory: Path

    def engine(self, *, optim: OptimConfig = OPTIM, **student: object) -> TorchEngine:
        setup = TrainingSetup(
            student=self.provider(**student),
            teacher=self.provider(seed=9),
            objective=ObjectiveConfig(kld=1.0, hidden_cosine=1.0),
            layer_map=(0, 1),
        )
        config = EngineConfig(device="cpu")
        engine = create_engine(setup, optim=optim, engine=config, batch_size=TRAIN.batch_size, seq_len=TRAIN.seq_len)
        assert isinstance(engine, TorchEngine)
        return engine

    def run(
        self,
        engine: TorchEngine,
        *,
        batches: BatchSource | None = None,
        config: TrainConfig = TRAIN,
        optim: OptimConfig = OPTIM,
        tokens_before: int = 0,
    ) -> TrainResult:
        tracking = TrackingConfig()
        names = {"run_name": "r", "step_name": "s", "stage": "distill"}
        with Tracker(self.metrics_file, tracking, **names, settings={}, resume_dir=self.metrics_file.parent) as tracker:
            return train(
                engine,
                batches=batches or self.batches,
                train=config,
                optim=optim,
                seed=3,
                resume_dir=self.directory / "resume",
                tracker=tracker,
                held_out=self.batches.batch(0).input_ids,
                tokens_before=tokens_before,
                desc="pico",
            )

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def points(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "resume").iterdir())


@pytest.fixture
def lab(llama_provider: Callable[..., ModelProvider], make_batches: Callable[..., BatchSource], tmp_path: Path) -> Lab:
    return Lab(llama_provider, make_batches(batch_size=4, seq_len=8), tmp_path)


def _parameters(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in engine.student.named_parameters()}


@dataclass
class KilledAt:
    """Batches of a run that dies when it asks for one of them."""

    batches: BatchSource
    step: int

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        if step == self.step:
            raise KeyboardInterrupt
        return self.batches.batch(step, rank, num_ranks)

    def describe_step(self, step: int) -> str:
        return self.batches.describe_step(step)


def test_training_closes_the_gap_to_the_teacher(lab: Lab) -> None:
    optim = replace(OPTIM, lr=2e-2)
    result = lab.run(lab.engine(seed=0, optim=optim), optim=optim)
    assert result.tokens == NUM_STEPS * 32
    start, end = result.evaluations[0], result.evaluations[-1]
    assert start.keys() == {"lm_loss", "kld", "top1_agreement_frac", "teacher_lm_loss"}
    assert end["kld"] < 0.7 * start["kld"]
    assert end["teacher_lm_loss"] == start["teacher_lm_loss"]
    assert result.metrics["eval/kld"] == end["kld"]


def test_the_curve_has_a_row_per_step_and_per_evaluation(lab: Lab) -> None:
    result = lab.run(lab.engine(seed=0), tokens_before=1000)
    evaluated = [row["tokens"] for row in result.curve if "eval/kld" in row]
    assert evaluated == [1000, 1256, 1512, 1640]  # the start, every 256 tokens, the end
    steps = [row for row in result.curve if "train/loss" in row]
    assert [row["tokens"] for row in steps] == [1000 + 32 * step for step in range(1, NUM_STEPS + 1)]
    names = {"tokens", "optim/lr", "optim/grad_norm", "train/loss", "train/kld", "train/hidden_cosine", "train/lm_loss"}
    assert all(names <= row.keys() for row in steps)
    assert steps[-1]["perf/tokens_per_s"] > 0
    assert steps[-1]["mem/peak_gib"] > 0
    assert steps[-1]["optim/lr"] == pytest.approx(OPTIM.lr * OPTIM.min_lr_frac)
    assert lab.rows() == result.curve


def _without_clock(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    measured = ("perf/tokens_per_s", "mem/peak_gib")
    return [{name: value for name, value in row.items() if name not in measured} for row in curve]


@pytest.mark.parametrize("killed_at", [1, 5, 13, 19])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(lab: Lab, tmp_path: Path, killed_at: int) -> None:
    """Dropout makes the result depend on the random state too."""
    uninterrupted = lab.engine(seed=0, dropout=0.2)
    reference = lab.run(uninterrupted)

    other = replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    with pytest.raises(KeyboardInterrupt):
        other.run(lab.engine(seed=0, dropout=0.2), batches=KilledAt(lab.batches, killed_at))
    torch.rand(7)
    resumed = lab.engine(seed=0, dropout=0.2)
    result = other.run(resumed)

    expected = _parameters(uninterrupted)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(resumed).items())
    assert _without_clock(result.curve) == _without_clock(reference.curve)
    assert other.rows() == result.curve


@dataclass
class Opening:
    """Batches of a run that dies at one step, and lets resume points be written from an earlier one on."""

    batches: BatchSource
    opens_at: int
    dies_at: int
    may_write: threading.Event

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        if step == self.opens_at:
            self.may_write.set()
        if step == self.dies_at:
            raise KeyboardInterrupt
        return self.batches.batch(step, rank, num_ranks)

    def describe_step(self, step: int) -> str:
        return self.batches.describe_step(step)


@pytest.mark.parametrize("dies_at", [9, 14])
def test_steps_made_while_a_point_is_written_do_not_change_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """The state after 5 steps reaches the disk after step 9: four in-place updates later."""
    uninterrupted = lab.engine(seed=0, dropout=0.2)
    reference = lab.run(uninterrupted)

    may_write, start = threading.Event(), resume._start

    def start_late(partial: Path) -> None:
        assert may_write.wait(60), "training waits for the disk"
        start(partial)

    other = replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_start", start_late)
        with pytest.raises(KeyboardInterrupt):
            other.run(lab.engine(seed=0, dropout=0.2), batches=Opening(lab.batches, 9, dies_at, may_write))
    assert other.points() == (["step_5"] if dies_at == 9 else ["step_10", "step_5"])
    resumed = lab.engine(seed=0, dropout=0.2)
    result = other.run(resumed)

    expected = _parameters(uninterrupted)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(resumed).items())
    assert _without_clock(result.curve) == _without_clock(reference.curve)


def test_a_run_is_the_same_whoever_waits_for_its_points(lab: Lab, tmp_path: Path) -> None:
    waiting, other = lab.engine(seed=0, dropout=0.2), replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    beside = lab.engine(seed=0, dropout=0.2)
    result = lab.run(waiting, config=replace(TRAIN, resume_points=ResumePointsConfig(background=False)))
    assert _without_clock(other.run(beside).curve) == _without_clock(result.curve)
    expected = _parameters(waiting)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(beside).items())


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_the_run_with_one_line_and_costs_no_earlier_point(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    reference = lab.engine(seed=0)
    result = lab.run(reference)
    other = replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    config = replace(TRAIN, resume_points=ResumePointsConfig(background=background))

    def no_space_left(path: Path) -> None:
        if "step_15.tmp" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    message = r"^step_15 could not be written to .*No space left.*; make room and run again to go on from step_10$"
    with monkeypatch.context() as patch:
        patch.setattr(resume, "flush_to_disk", no_space_left)
        with pytest.raises(ValueError, match=message) as error:
            other.run(lab.engine(seed=0), config=config)
    assert "\n" not in str(error.value)
    assert other.points() == ["step_10", "step_5"]

    resumed = lab.engine(seed=0)
    assert _without_clock(other.run(resumed, config=config).curve) == _without_clock(result.curve)
    expected = _parameters(reference)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(resumed).items())


def test_a_finished_run_is_not_run_again(lab: Lab) -> None:
    first = lab.engine(seed=0)
    result = lab.run(first)
    again = lab.engine(seed=5)
    repeated = lab.run(again, batches=KilledAt(lab.batches, 0))
    assert repeated == result
    expected = _parameters(first)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(again).items())


def test_the_newest_two_resume_points_stay(lab: Lab) -> None:
    lab.run(lab.engine(seed=0))
    assert lab.points() == ["step_15", "step_20"]


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        (ResumePointsConfig(newest=1), ["step_20"]),
        (ResumePointsConfig(newest=3), ["step_10", "step_15", "step_20"]),
        (ResumePointsConfig(newest=1, every=2), ["step_10", "step_20"]),
        (ResumePointsConfig(newest=2, every=1), ["step_10", "step_15", "step_20", "step_5"]),
    ],
)
def test_which_points_stay_is_configured(lab: Lab, points: ResumePointsConfig, kept: list[str]) -> None:
    lab.run(lab.engine(seed=0), config=replace(TRAIN, resume_points=points))
    assert lab.points() == kept


def test_every_nth_point_is_one_that_fell_due() -> None:
    """Steps of 32 tokens, a point every 100: after steps 4, 7, 10, 13. One in between, of a preemption, is none."""
    config = replace(TRAIN, resume_every_tokens=100, resume_points=ResumePointsConfig(newest=1, every=2))
    assert config.kept_points([4, 7, 8, 10, 13, 14]) == [7, 13, 14]
    assert config.kept_points([4]) == [4]
    assert config.kept_points([]) == []


def test_retention_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resume_points.newest must be >= 1, got 0"):
        ResumePointsConfig(newest=0)
    with pytest.raises(ValueError, match=r"resume_points.every must be >= 0 \(0: none\), got -1"):
        ResumePointsConfig(every=-1)


def test_resume_points_default_to_a_tenth_of_the_budget(lab: Lab) -> None:
    config = replace(TRAIN, resume_every_tokens=0)
    with pytest.raises(KeyboardInterrupt):
        lab.run(lab.engine(seed=0), config=config, batches=KilledAt(lab.batches, 7))
    assert lab.points() == ["step_4", "step_6"]


def _break(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan


@dataclass
class PoisonedAt:
    """Spoils the student's weights before one of the steps."""

    batches: BatchSource
    step: int
    student: nn.Module

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        if step == self.step:
            _break(self.student)
        return self.batches.batch(step, rank, num_ranks)

    def describe_step(self, step: int) -> str:
        return self.batches.describe_step(step)


def test_a_loss_that_is_not_finite_stops_the_run(lab: Lab, tmp_path: Path) -> None:
    """The same command goes on from the last good point, as if nothing had been."""
    engine = lab.engine(seed=0, dropout=0.2)
    with pytest.raises(
        ValueError, match=r"^pico: train/loss is nan at step 8 \(256 tokens\), on tokens of seed 1;"
    ) as error:
        lab.run(engine, batches=PoisonedAt(lab.batches, 7, engine.student))
    assert f"last good resume point: {lab.directory / 'resume' / 'step_5'}; the same command" in str(error.value)
    assert "\n" not in str(error.value)
    assert lab.points() == ["step_5"]
    assert lab.rows()[-1]["tokens"] == 224  # the last sound step

    other = replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    uninterrupted, resumed = lab.engine(seed=0, dropout=0.2), lab.engine(seed=0, dropout=0.2)
    reference = other.run(uninterrupted)
    assert _without_clock(lab.run(resumed).curve) == _without_clock(reference.curve)
    expected = _parameters(uninterrupted)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in _parameters(resumed).items())


@pytest.mark.parametrize("poisoned_at", [10, 11, 14])
def test_the_point_on_its_way_is_waited_for_and_named(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, poisoned_at: int
) -> None:
    """The state after 10 steps reaches the disk only when all is read, in a later step that ends the run."""
    stopped, start, last = threading.Event(), resume._start, PointWriter.last_committed

    def start_late(partial: Path) -> None:
        if partial.name.startswith("step_10"):
            assert stopped.wait(60), "the run goes on"
        start(partial)

    def last_committed(points: PointWriter) -> Path | None:
        stopped.set()
        return last(points)

    engine = lab.engine(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_start", start_late)
        patch.setattr(PointWriter, "last_committed", last_committed)
        message = rf"at step {poisoned_at + 1} .*; last good resume point: {lab.directory / 'resume' / 'step_10'};"
        with pytest.raises(ValueError, match=message):
            lab.run(engine, batches=PoisonedAt(lab.batches, poisoned_at, engine.student))
    assert lab.points() == ["step_10", "step_5"]
    resumed = lab.engine(seed=0)
    assert lab.run(resumed).tokens == NUM_STEPS * 32
    assert all(parameter.isfinite().all() for parameter in _parameters(resumed).values())


def test_a_student_that_starts_broken_is_refused_before_the_first_step(lab: Lab) -> None:
    engine = lab.engine(seed=0)
    _break(engine.student)
    message = r"eval/\w+ is nan at step 0 \(0 tokens\), on the 4 held-out sequences; no resume point of this "
    with pytest.raises(ValueError, match=message):
        lab.run(engine, batches=KilledAt(lab.batches, 0))


def test_evaluation_and_tracker_are_optional(lab: Lab, tmp_path: Path) -> None:
    setup = TrainingSetup(student=lab.provider(seed=0), objective=ObjectiveConfig(lm=1.0))
    config = EngineConfig(device="cpu", precision="bf16")
    result = train(
        create_engine(setup, optim=OPTIM, engine=config, batch_size=4, seq_len=8),
        batches=lab.batches,
        train=TRAIN,
        optim=OPTIM,
        seed=0,
        resume_dir=tmp_path / "resume",
        tracker=None,
        held_out=None,
        desc="pico",
    )
    assert result.evaluations == []
    assert result.metrics["train/lm_loss"] > 0
    assert not lab.metrics_file.exists()
