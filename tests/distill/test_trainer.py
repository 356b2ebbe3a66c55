from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, TrackingConfig, TrainConfig
from distill.evaluate import evaluate_model
from distill.objective import Objective
from distill.teacher import Teacher
from distill.tracking import Tracker
from distill.trainer import BatchSource, TrainResult, train

TRAIN = TrainConfig(max_tokens=620, seq_len=8, batch_size=4, eval_every_tokens=256, resume_every_tokens=160)
OPTIM = OptimConfig(lr=5e-3, warmup_frac=0.1)
NUM_STEPS = 20
"""620 tokens in steps of 32: the last step is the first that reaches the budget."""


@dataclass
class Lab:
    """Trains tiny students of one teacher in one directory."""

    make_llama: Callable[..., LlamaForCausalLM]
    batches: BatchSource
    directory: Path

    def run(
        self,
        student: LlamaForCausalLM,
        *,
        batches: BatchSource | None = None,
        config: TrainConfig = TRAIN,
        optim: OptimConfig = OPTIM,
        tokens_before: int = 0,
    ) -> TrainResult:
        teacher = self.make_llama(seed=9)
        sequences = self.batches.batch(0)
        tracking = TrackingConfig()
        with Tracker(self.metrics_file, tracking, run_name="r", step_name="s", stage="distill", settings={}) as tracker:
            return train(
                model=student,
                objective=Objective(
                    config=ObjectiveConfig(kld=1.0, hidden_cosine=1.0), teacher=Teacher(teacher), layer_map=(0, 1)
                ),
                batches=batches or self.batches,
                train=config,
                optim=optim,
                engine=EngineConfig(device="cpu"),
                seed=3,
                resume_dir=self.directory / "resume",
                tracker=tracker,
                evaluate=lambda: evaluate_model(student, sequences, teacher=teacher, batch_size=4, chunk_tokens=64),
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
def lab(make_llama: Callable[..., LlamaForCausalLM], make_batches: Callable[..., BatchSource], tmp_path: Path) -> Lab:
    return Lab(make_llama, make_batches(batch_size=4, seq_len=8), tmp_path)


@dataclass
class KilledAt:
    """Batches of a run that dies when it asks for one of them."""

    batches: BatchSource
    step: int

    def batch(self, step: int) -> Tensor:
        if step == self.step:
            raise KeyboardInterrupt
        return self.batches.batch(step)


def test_training_closes_the_gap_to_the_teacher(lab: Lab) -> None:
    result = lab.run(lab.make_llama(seed=0), optim=replace(OPTIM, lr=2e-2))
    assert result.tokens == NUM_STEPS * 32
    start, end = result.evaluations[0], result.evaluations[-1]
    assert start.keys() == {"lm_loss", "kld", "top1_agreement_frac"}
    assert end["kld"] < 0.7 * start["kld"]
    assert result.metrics["eval/kld"] == end["kld"]


def test_the_curve_has_a_row_per_step_and_per_evaluation(lab: Lab) -> None:
    result = lab.run(lab.make_llama(seed=0), tokens_before=1000)
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
    uninterrupted = lab.make_llama(seed=0, dropout=0.2)
    reference = lab.run(uninterrupted)

    other = replace(lab, directory=tmp_path / "other")
    other.directory.mkdir()
    with pytest.raises(KeyboardInterrupt):
        other.run(lab.make_llama(seed=0, dropout=0.2), batches=KilledAt(lab.batches, killed_at))
    torch.rand(7)
    resumed = lab.make_llama(seed=0, dropout=0.2)
    result = other.run(resumed)

    for (name, parameter), expected in zip(resumed.named_parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert _without_clock(result.curve) == _without_clock(reference.curve)
    assert other.rows() == result.curve


def test_a_finished_run_is_not_run_again(lab: Lab) -> None:
    first = lab.make_llama(seed=0)
    result = lab.run(first)
    again = lab.make_llama(seed=5)
    repeated = lab.run(again, batches=KilledAt(lab.batches, 0))
    assert repeated == result
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_newest_two_resume_points_stay(lab: Lab) -> None:
    lab.run(lab.make_llama(seed=0))
    assert lab.points() == ["step_15", "step_20"]


def test_resume_points_default_to_a_tenth_of_the_budget(lab: Lab) -> None:
    config = replace(TRAIN, resume_every_tokens=0)
    with pytest.raises(KeyboardInterrupt):
        lab.run(lab.make_llama(seed=0), config=config, batches=KilledAt(lab.batches, 7))
    assert lab.points() == ["step_4", "step_6"]


@dataclass
class PoisonedAt:
    """Spoils the student's weights before one of the steps."""

    batches: BatchSource
    step: int
    student: LlamaForCausalLM

    def batch(self, step: int) -> Tensor:
        if step == self.step:
            with torch.no_grad():
                self.student.model.norm.weight[0] = torch.nan
        return self.batches.batch(step)


def test_a_loss_that_is_not_finite_stops_the_run(lab: Lab) -> None:
    student = lab.make_llama(seed=0)
    with pytest.raises(ValueError, match=r"^pico: train/loss is nan at step 8 \(256 tokens\)") as error:
        lab.run(student, batches=PoisonedAt(lab.batches, 7, student))
    assert str(lab.directory / "resume" / "step_5") in str(error.value)
    assert lab.points() == ["step_5"]
    assert lab.rows()[-1]["tokens"] == 224  # the last sound step


def test_a_student_that_starts_broken_is_refused_before_the_first_step(lab: Lab) -> None:
    student = lab.make_llama(seed=0)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"eval/\w+ is nan at step 0 \(0 tokens\); last good resume point: none"):
        lab.run(student, batches=KilledAt(lab.batches, 0))


def test_evaluation_is_optional(lab: Lab, tmp_path: Path) -> None:
    with Tracker(
        tmp_path / "m.jsonl", TrackingConfig(), run_name="r", step_name="s", stage="pretrain", settings={}
    ) as tracker:
        result = train(
            model=lab.make_llama(seed=0),
            objective=Objective(config=ObjectiveConfig(lm=1.0)),
            batches=lab.batches,
            train=TRAIN,
            optim=OPTIM,
            engine=EngineConfig(device="cpu", precision="bf16"),
            seed=0,
            resume_dir=tmp_path / "resume",
            tracker=tracker,
            evaluate=None,
            desc="pico",
        )
    assert result.evaluations == []
    assert result.metrics["train/lm_loss"] > 0
