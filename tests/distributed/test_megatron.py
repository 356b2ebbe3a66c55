"""megatron-core's tensor and pipeline parallelism against the reference engine in one process, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distill import distributed
from distill.chunked_head import TopK
from distill.config import ObjectiveConfig, RopeConfig, TrainConfig
from distill.data.batch import IGNORE_INDEX, Batch
from distill.engine.setup import TrainingSetup
from distill.failures import SharedError
from distill.trainer import TrainResult, train
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model
from puzzle.model.provider import DirectoryProvider
from tests.distributed.conftest import RunInProcesses
from tests.distributed.megatron_models import (
    BATCH_SIZE,
    NUM_STEPS,
    OPTIM,
    SEQ_LEN,
    Models,
    in_process,
    make_engine,
    save_models,
    save_seeded,
    student_blocks,
    tokens,
    train_steps,
)

pytest.importorskip("megatron.core")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for CUDA where there is none")

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
"""Relative, and absolute in nats or in weights. Sums of fp32 in another order differ by 1e-7 of their size; AdamW's
division by the root of a small second moment enlarges that over 20 steps."""


@pytest.fixture(scope="module")
def models(pico_architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """Teacher and student with and without tied embeddings."""
    return save_models(pico_architecture, tmp_path_factory.mktemp("models"))


def _train(setup: TrainingSetup, split: str | None, out: Path, **options: Any) -> tuple[list, dict, dict]:
    """Metrics of the steps and held-out metrics before and after them; the student goes to ``out``."""
    engine = make_engine(setup, split, **options)
    before = engine.evaluate(tokens(5, seed=99))
    metrics = train_steps(engine, 0, NUM_STEPS)
    after = engine.evaluate(tokens(5, seed=99))
    engine.export(out)
    return metrics, before, after


def _train_in_process(setup: TrainingSetup, split: str, out: Path, options: dict[str, Any]) -> tuple[list, dict, dict]:
    return in_process(_train, setup, split, out, **options)


def _assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], rtol: float = 2e-4) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=rtol, abs=2e-5), f"{name} at {step}"


def _assert_same_model(found: Path, expected: Path, **tolerance: float) -> None:
    one, other = load_model(found).state_dict(), load_model(expected).state_dict()
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@on_cpu
@pytest.mark.parametrize(("kind", "split"), [("untied", "tensor"), ("tied", "pipeline"), ("tied", "data")])
def test_kd_equals_the_reference_engine(
    models: dict[str, Models], kind: str, split: str, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    setup = models[kind].setup()
    expected, before, after = _train(setup, None, tmp_path / "reference")
    for metrics, *evaluations in run_in_processes(2, _train_in_process, setup, split, tmp_path / "out", {}):
        _assert_close(metrics, expected)
        _assert_close(evaluations, [before, after])
    _assert_same_model(tmp_path / "out", tmp_path / "reference", **TOLERANCE)


def _resume_in_process(setup: TrainingSetup, state: Path) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        engine = make_engine(setup, "tensor", recompute=True)
        found: dict[str, Any] = {"first": train_steps(engine, 0, 10)}
        engine.save(state)
        found["on"] = train_steps(engine, 10, 13)
        for split in ("tensor", "pipeline"):
            resumed = make_engine(setup, split)
            resumed.load(state)
            found[split] = train_steps(resumed, 10, 13 if split == "tensor" else NUM_STEPS)
        return found

    return in_process(run)


@on_cpu
def test_a_run_goes_on_at_the_same_and_at_another_layout(
    models: dict[str, Models], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    setup = models["untied"].setup()
    expected, _, _ = _train(setup, None, tmp_path / "reference")
    (tmp_path / "state").mkdir()
    for found in run_in_processes(2, _resume_in_process, setup, tmp_path / "state"):
        _assert_close(found["first"], expected[:10])
        assert found["tensor"] == found["on"]
        _assert_close(found["pipeline"], expected[10:])


def _overlapping_in_process(setup: TrainingSetup, split: str, out: Path) -> tuple[list, dict, dict]:
    def run() -> tuple[list, dict, dict]:
        from distill.engine import megatron_engine, megatron_state

        with (
            mock.patch.object(megatron_engine, "_overlaps", return_value=True),
            mock.patch.object(megatron_state, "BUCKET_PARAMETERS", 10_000),
        ):
            return _train(setup, split, out)

    return in_process(run)


@on_cpu
@pytest.mark.parametrize(("kind", "split"), [("untied", "data"), ("tied", "pipeline")])
def test_messages_beside_the_computation_change_nothing(
    models: dict[str, Models], kind: str, split: str, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    setup = models[kind].setup()
    expected, before, after = _train(setup, None, tmp_path / "reference")
    for metrics, *evaluations in run_in_processes(2, _overlapping_in_process, setup, split, tmp_path / "out"):
        _assert_close(metrics, expected)
        _assert_close(evaluations, [before, after])
    _assert_same_model(tmp_path / "out", tmp_path / "reference", **TOLERANCE)


def _round_trip_in_process(directories: list[Path], out: Path) -> list[dict[str, float]]:
    def run() -> list[dict[str, float]]:
        found = []
        for split in ("tensor", "pipeline"):
            for directory in directories:
                setup = TrainingSetup(student=DirectoryProvider(directory), objective=ObjectiveConfig(lm=1.0))
                engine = make_engine(setup, split)
                found.append(engine.evaluate(tokens(3, seed=5)))
                engine.export(out / split / directory.name)
        return found

    return in_process(run)


@on_cpu
def test_weights_come_back_as_they_were_whatever_the_architecture(
    pico_architecture: Architecture, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    student = pico_architecture.with_blocks(student_blocks())
    llama3 = RopeConfig(
        theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16
    )
    yarn = RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_positions=16)
    kinds = {
        "llama3": replace(student, rope=llama3),
        "yarn": replace(student, rope=yarn),
        "qwen": replace(student, qkv_bias=True, qk_norm=True, tie_embeddings=True),
        "mistral": replace(student, sliding_window=7, head_dim=32),
    }
    directories = [save_seeded(kind, tmp_path / name, seed=2) for name, kind in kinds.items()]
    expected = []
    for directory in directories:
        setup = TrainingSetup(student=DirectoryProvider(directory), objective=ObjectiveConfig(lm=1.0))
        expected.append(make_engine(setup, None).evaluate(tokens(3, seed=5)))
    for found in run_in_processes(2, _round_trip_in_process, directories, tmp_path / "out"):
        _assert_close(found, 2 * expected, rtol=1e-5)
    for split in ("tensor", "pipeline"):
        for directory in directories:
            _assert_same_model(tmp_path / "out" / split / directory.name, directory, rtol=0, atol=0)


class _Store:
    """A cache of one teacher: six likeliest tokens at every position, drawn by the sequence's number."""

    vocab_size = 320

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> TopK:
        ids, log_probs = [], []
        for index in sequence_ids.tolist():
            logits = torch.randn(SEQ_LEN, self.vocab_size, generator=torch.Generator().manual_seed(index)) * 4
            top = logits.log_softmax(-1).topk(6)
            ids.append(top.indices[positions])
            log_probs.append(top.values[positions])
        return TopK(token_ids=torch.stack(ids).to(device), log_probs=torch.stack(log_probs).to(device))


@on_cpu
def test_stored_signals_and_separate_documents_under_tensor_parallel(
    models: dict[str, Models], run_in_processes: RunInProcesses
) -> None:
    student = DirectoryProvider(models["untied"].student)
    setup = TrainingSetup(student=student, objective=ObjectiveConfig(kld=1.0, lm=0.5), store=_Store())
    expected = _packed_steps(setup, None)
    for found in run_in_processes(2, _packed_in_process, setup):
        _assert_close(found, expected)


def _packed_steps(setup: TrainingSetup, split: str | None) -> list[dict[str, float]]:
    engine = make_engine(setup, split)
    starts = torch.zeros(BATCH_SIZE, SEQ_LEN, dtype=torch.long)
    starts[:, 11], starts[1, 20] = 11, 20
    batch = Batch.of(tokens(BATCH_SIZE, seed=0))
    labels = batch.labels.clone()
    labels[:, 10], labels[1, 19] = IGNORE_INDEX, IGNORE_INDEX
    positions = batch.position_ids - starts.cummax(1).values
    batch = replace(batch, labels=labels, position_ids=positions, separate_documents=True)
    found = [engine.step(batch, lr=1e-3) for _ in range(3)]
    return [{name: float(value) for name, value in metrics.items()} for metrics in found]


def _packed_in_process(setup: TrainingSetup) -> list[dict[str, float]]:
    return in_process(_packed_steps, setup, "tensor")


@on_cpu
def test_without_cuda_devices_the_engine_names_the_way_out(models: dict[str, Models]) -> None:
    with pytest.raises(ValueError, match=r"engine.name=megatron needs CUDA devices.*engine.name=torch or deepspeed"):
        make_engine(models["untied"].setup(), "tensor")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
@pytest.mark.parametrize(("kind", "split"), [("untied", "tensor"), ("tied", "pipeline"), ("tied", "data")])
def test_kd_on_gpus_equals_the_reference_engine(
    models: dict[str, Models], kind: str, split: str, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    # fp32 on another device, with fused kernels: the CPU's tolerance, ten times as wide.
    setup = models[kind].setup()
    expected, before, after = _train(setup, None, tmp_path / "reference")
    for metrics, *evaluations in run_in_processes(2, _train_in_process, setup, split, tmp_path / "out", {}):
        _assert_close(metrics, expected, rtol=2e-3)
        _assert_close(evaluations, [before, after], rtol=2e-3)
    bf16 = run_in_processes(2, _train_in_process, setup, split, tmp_path / "bf16", {"precision": "bf16"})
    # bf16 has 8 bits of mantissa: losses agree to a percent, hidden distances of random models too.
    assert bf16[0][0][-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.02)


@dataclass(frozen=True)
class PoisonedAt:
    """Spoils a weight of the second process before one of the steps."""

    engine: Any
    step: int

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        if step == self.step and distributed.rank() == 1:
            with torch.no_grad():
                list(self.engine._parameters.values())[-1].view(-1)[0] = torch.nan
        share = BATCH_SIZE // num_ranks
        return Batch.of(tokens(BATCH_SIZE, seed=step)).rows(rank * share, (rank + 1) * share)

    def describe_step(self, step: int) -> str:
        return f"tokens of seed {step}"


def _train_until_not_a_number(setup: TrainingSetup, split: str, resume_dir: Path) -> tuple[str, int]:
    """What ends the run, and the tokens of one that goes on from its last point."""

    def run(poisoned_at: int) -> TrainResult:
        engine = make_engine(setup, split)
        return train(
            engine,
            batches=PoisonedAt(engine, poisoned_at),
            train=TrainConfig(max_tokens=8 * BATCH_SIZE * SEQ_LEN, seq_len=SEQ_LEN, batch_size=BATCH_SIZE),
            optim=OPTIM,
            seed=3,
            resume_dir=resume_dir,
            tracker=None,
            held_out=None,
            desc="pico",
        )

    def fail_and_go_on() -> tuple[str, int]:
        with pytest.raises(SharedError) as error:
            run(5)
        return str(error.value), run(-1).tokens

    return in_process(fail_and_go_on)


@on_cpu
@pytest.mark.parametrize(
    "split", ["tensor", *(pytest.param(it, marks=pytest.mark.slow) for it in ("pipeline", "data"))]
)
def test_what_is_not_a_number_in_one_process_ends_all_at_one_step(
    models: dict[str, Models], split: str, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    found = run_in_processes(2, _train_until_not_a_number, models["untied"].setup(), split, tmp_path)
    assert found[0] == found[1]
    message, tokens = found[0]
    assert " is nan at step 6 (768 tokens), on tokens of seed 5; last good resume point: " in message
    assert f"{tmp_path}/step_5; " in message
    assert tokens == 8 * BATCH_SIZE * SEQ_LEN
