"""DDP, FSDP2 and sequence parallelism against one process."""

from __future__ import annotations

import contextlib
import math
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import distributed, resume
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, TrainConfig
from distill.data.batch import Batch
from distill.engine.base import Engine, create_engine
from distill.engine.setup import TrainingSetup
from distill.failures import SharedError
from distill.trainer import TrainResult, train
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.provider import DirectoryProvider
from tests.distributed.conftest import RunInProcesses

SEQ_LEN = 16
BATCH_SIZE = 8
NUM_STEPS = 20
TRAIN = TrainConfig(
    max_tokens=NUM_STEPS * BATCH_SIZE * SEQ_LEN,
    seq_len=SEQ_LEN,
    batch_size=BATCH_SIZE,
    resume_every_tokens=5 * BATCH_SIZE * SEQ_LEN,
)
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.1, grad_clip=1.0)
HELD_OUT = torch.randint(320, (5, SEQ_LEN), generator=torch.Generator().manual_seed(99))
"""An odd number: one rank of two has a sequence less."""

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "data_parallel": {
        "ddp": {"micro_batch_tokens": 2 * SEQ_LEN},
        "fsdp": {
            "shard": True,
            "micro_batch_tokens": 2 * SEQ_LEN,
            "recompute": True,
            "offload_activations": True,
            "ffn_tile_tokens": 16,
        },
        "offload": {"offload_optimizer": True},
    },
    "sequence_parallel": {
        "ddp": {"sequence_parallel": 2, "micro_batch_tokens": 2 * SEQ_LEN},
        "fsdp": {"sequence_parallel": 2, "shard": True},
    },
}


@dataclass(frozen=True)
class RandomBatches:
    """Few distinct sequences, so that a tiny model can learn them; labels are missing in one of them."""

    interrupt_at: int = -1

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step % 3)
        whole = Batch.of(torch.randint(320, (BATCH_SIZE, SEQ_LEN), generator=generator))
        whole.labels[0, :9] = -100
        share = BATCH_SIZE // num_ranks
        return whole.rows(rank * share, (rank + 1) * share)

    def describe_step(self, step: int) -> str:
        return f"tokens of seed {step % 3}"


@dataclass(frozen=True)
class Models:
    """Directories of student and teacher."""

    student: Path
    teacher: Path
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(kld=1.0, hidden_cosine=1.0, lm=0.5, temperature=2.0)
    )

    def engine(self, *, device: str = "cpu", **engine: Any) -> Engine:
        setup = TrainingSetup(
            student=DirectoryProvider(self.student),
            teacher=DirectoryProvider(self.teacher),
            objective=self.objective,
            layer_map=(0, 0, 1, 1, 2, 3) if self.objective.compares_hidden else (),
        )
        config = EngineConfig(device=device, **engine)  # type: ignore[arg-type]
        return create_engine(setup, optim=OPTIM, engine=config, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)

    def train(self, engine: Engine, resume_dir: Path, batches: RandomBatches | None = None) -> TrainResult:
        return train(
            engine,
            batches=RandomBatches() if batches is None else batches,
            train=TRAIN,
            optim=OPTIM,
            seed=3,
            resume_dir=resume_dir,
            tracker=None,
            held_out=HELD_OUT,
            desc="pico",
        )


@pytest.fixture
def models(heterogeneous_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> Models:
    """A student with every kind of block, and a teacher of other shape."""
    student = tmp_path / "student"
    model = build_model(heterogeneous_architecture, seed=5)
    save_model(model, student, architecture=heterogeneous_architecture, tokenizer_from=pico_parent_dir)
    return Models(student=student, teacher=pico_parent_dir)


def _weights(directory: Path) -> dict[str, Tensor]:
    provider = DirectoryProvider(directory)
    return {name: provider.read(name) for name in provider.names()}


def _train_layouts(models: Models, layouts: dict[str, dict[str, Any]], out: Path) -> dict[str, list[dict[str, float]]]:
    distributed.join()
    curves = {}
    with distributed.together():
        for name, engine in layouts.items():
            runner = models.engine(**engine)
            curves[name] = models.train(runner, out / f"{name}_resume").curve
            runner.export(out / name)
    return curves


def _without_clock(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))}


def _assert_close(directory: Path, expected: dict[str, Tensor]) -> None:
    trained = _weights(directory)
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        # Adam divides by the gradient's size, so that rounding of a tiny gradient shows: 5% of one step at the peak.
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=0.05 * OPTIM.lr, msg=name)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_two_processes_train_as_one(
    models: Models, tmp_path: Path, run_in_processes: RunInProcesses, kind: str
) -> None:
    """Every layout takes the same 20 steps and comes to the same weights."""
    alone = models.engine()
    expected = models.train(alone, tmp_path / "alone_resume").curve
    alone.export(tmp_path / "alone")
    weights = _weights(tmp_path / "alone")

    curves, others = run_in_processes(2, _train_layouts, models, LAYOUTS[kind], tmp_path)
    for name in LAYOUTS[kind]:
        for row, other, reference in zip(curves[name], others[name], expected, strict=True):
            assert _without_clock(row) == _without_clock(other)
            # fp32 sums in another order, carried on over 20 steps.
            assert _without_clock(row) == pytest.approx(_without_clock(reference), rel=2e-4, abs=1e-5), name
        _assert_close(tmp_path / name, weights)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_two_gpus_train_as_one(models: Models, tmp_path: Path, run_in_processes: RunInProcesses, kind: str) -> None:
    """The same over NCCL, also with compiled blocks."""
    layouts = {name: {**layout, "device": "cuda"} for name, layout in LAYOUTS[kind].items()}
    layouts["compiled"] = {**layouts["fsdp"], "compile": True}
    alone = models.engine(device="cuda")
    expected = models.train(alone, tmp_path / "alone_resume").curve
    alone.export(tmp_path / "alone")
    weights = _weights(tmp_path / "alone")

    curves, _ = run_in_processes(2, _train_layouts, models, layouts, tmp_path)
    for name in layouts:
        for row, reference in zip(curves[name], expected, strict=True):
            # As on the CPU; kernels differ with the shapes that ranks see.
            assert _without_clock(row) == pytest.approx(_without_clock(reference), rel=1e-3, abs=1e-4), name
        _assert_close(tmp_path / name, weights)


def _train_until(models: Models, resume_dir: Path, interrupt_at: int, layout: dict[str, Any], out: Path) -> None:
    runner = models.engine(**layout)
    try:
        models.train(runner, resume_dir, RandomBatches(interrupt_at=interrupt_at))
    except KeyboardInterrupt:
        return
    runner.export(out)


def _train_together_until(*arguments: Any) -> None:
    distributed.join()
    with distributed.together():
        _train_until(*arguments)


@pytest.mark.parametrize("layout", [{}, {"shard": True}], ids=["ddp", "fsdp"])
def test_a_run_without_a_term_on_the_logits_goes_on(
    models: Models, tmp_path: Path, run_in_processes: RunInProcesses, layout: dict[str, Any]
) -> None:
    """A head of its own has no gradient then, and stays as it is."""
    models = replace(models, objective=ObjectiveConfig(hidden_cosine=1.0))
    _train_until(models, tmp_path / "uninterrupted", -1, {}, tmp_path / "expected")
    resume_dir, out = tmp_path / "resume", tmp_path / "out"
    run_in_processes(2, _train_together_until, models, resume_dir, 7, layout, out)
    run_in_processes(2, _train_together_until, models, resume_dir, -1, layout, out)
    _assert_close(out, _weights(tmp_path / "expected"))
    assert torch.equal(_weights(out)["lm_head.weight"], _weights(models.student)["lm_head.weight"])


class NotingProvider(DirectoryProvider):
    """Notes how many bytes are read of each tensor, and refuses to load a whole model."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.num_bytes: dict[str, int] = {}

    def load(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        raise AssertionError("a rank loads the whole model")

    def read(self, name: str, rows: range | None = None) -> Tensor:
        tensor = super().read(name, rows)
        self.num_bytes[name] = tensor.nbytes
        return tensor


def _read_sharded(student: Path, out: Path) -> dict[str, int]:
    distributed.join()
    with distributed.together():
        provider = NotingProvider(student)
        setup = TrainingSetup(student=provider, objective=ObjectiveConfig(lm=1.0))
        config = EngineConfig(device="cpu", shard=True)
        runner = create_engine(setup, optim=OPTIM, engine=config, batch_size=distributed.world_size(), seq_len=SEQ_LEN)
        runner.export(out)
    return provider.num_bytes


def test_a_sharded_student_is_read_once_by_all_ranks_together(
    models: Models, tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    """Three ranks: some tensors do not come out even."""
    by_rank = run_in_processes(3, _read_sharded, models.student, tmp_path / "out")
    found, expected = _weights(tmp_path / "out"), _weights(models.student)
    for name, tensor in expected.items():
        assert sum(rank[name] for rank in by_rank) == tensor.nbytes, name
        assert torch.equal(found[name], tensor), name


def _train_with_late_points(models: Models, resume_dir: Path, layout: dict[str, Any]) -> None:
    """Nothing of the point after step 5 is written before step 9 is made, and the run dies there."""
    distributed.join()
    may_write, start = threading.Event(), resume._start

    def start_late(partial: Path) -> None:
        assert may_write.wait(60), "training waits for the disk"
        start(partial)

    class Batches(RandomBatches):
        def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
            if step == 9:
                may_write.set()
                raise KeyboardInterrupt
            return super().batch(step, rank, num_ranks)

    resume._start = start_late
    with distributed.together(), contextlib.suppress(KeyboardInterrupt):
        models.train(models.engine(**layout), resume_dir, Batches())


@pytest.mark.parametrize("layout", [{}, {"shard": True}, {"offload_optimizer": True}], ids=["ddp", "fsdp", "offload"])
def test_ranks_train_while_a_point_of_theirs_is_written(
    models: Models, tmp_path: Path, run_in_processes: RunInProcesses, layout: dict[str, Any]
) -> None:
    """Each of them copies its part, and what all have whole is copied once. One process goes on from it."""
    _train_until(models, tmp_path / "uninterrupted", -1, {}, tmp_path / "expected")
    run_in_processes(2, _train_with_late_points, models, tmp_path / "resume", layout)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["step_5"]
    _train_until(models, tmp_path / "resume", -1, {}, tmp_path / "out")
    _assert_close(tmp_path / "out", _weights(tmp_path / "expected"))


def test_a_run_goes_on_under_another_layout(models: Models, tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    """From two sharded ranks to one process, to two whole ranks, to two sharded ones on the CPU."""
    _train_until(models, tmp_path / "uninterrupted", -1, {}, tmp_path / "expected")
    resume_dir, out = tmp_path / "resume", tmp_path / "out"
    run_in_processes(2, _train_together_until, models, resume_dir, 7, {"shard": True}, out)
    _train_until(models, resume_dir, 12, {}, out)
    run_in_processes(2, _train_together_until, models, resume_dir, 17, {}, out)
    assert not out.exists()
    assert {path.name for path in resume_dir.iterdir()} == {"step_10", "step_15"}
    run_in_processes(2, _train_together_until, models, resume_dir, -1, {"offload_optimizer": True}, out)
    _assert_close(out, _weights(tmp_path / "expected"))


def _train_with_a_rank_astray(models: Models, resume_dir: Path) -> str:
    distributed.join()
    with distributed.together():
        engine = models.engine()
        if distributed.rank() == 1:
            evaluate = engine.evaluate
            engine.evaluate = lambda sequences: dict.fromkeys(evaluate(sequences), math.nan)
        with pytest.raises(SharedError) as error:
            models.train(engine, resume_dir)
    return str(error.value)


def test_what_one_rank_alone_sees_ends_all(models: Models, tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    """Metrics are sums over the ranks. Should one of them read another value, it must not leave the others waiting."""
    first, second = run_in_processes(2, _train_with_a_rank_astray, models, tmp_path / "resume")
    assert first == second
    assert re.search(
        r" is nan at step 0 \(0 tokens\), on the \d+ held-out sequences; no resume point of this training yet: ", first
    )
