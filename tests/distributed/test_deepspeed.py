"""ZeRO in two processes against the torch engine in one: the same batches, losses and weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig
from distill.data.batch import Batch
from distill.engine.base import create_engine
from distill.engine.deepspeed_engine import read_elements
from distill.engine.setup import TrainingSetup
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, build_model, save_model
from puzzle.model.provider import DirectoryProvider
from tests.distributed.conftest import RunInProcesses

# Not imported here: the engine chooses the accelerator before it imports the library.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra [deepspeed]")

NUM_STEPS, BATCH_SIZE, SEQ_LEN = 20, 4, 32
# Clipped in every step, so that equal results mean an equal norm over all ranks too.
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, grad_clip=0.5)
OBJECTIVE = ObjectiveConfig(kld=1.0, hidden_cosine=1.0, lm=0.5, chunk_tokens=16)
TORCH = EngineConfig(device="cpu")
RTOL, ATOL = 5e-5, 5e-6
"""fp32 sums in another order: 2e-6 of a metric and 2e-7 in a weight were seen, while weights move by 6e-3 or more."""
# Two micro-batches on each of two ranks.
ZERO = EngineConfig(name="deepspeed", device="cpu", micro_batch_tokens=SEQ_LEN)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Steps ``first`` to ``end - 1`` of one training, between resume points."""

    engine: EngineConfig
    student: Path
    teacher: Path
    layer_map: tuple[int, ...]
    first: int = 0
    end: int = NUM_STEPS
    objective: ObjectiveConfig = OBJECTIVE
    load: Path | None = None
    save: Path | None = None
    save_after: int = NUM_STEPS // 2
    export: Path | None = None


def batch_of(step: int, rank: int, num_ranks: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    batch = Batch.of(torch.randint(0, 320, (BATCH_SIZE, SEQ_LEN), generator=generator))
    share = BATCH_SIZE // num_ranks
    # Unequal numbers of targets per rank: means of means would differ from the mean over all.
    batch.labels[0, SEQ_LEN // 2 :] = -100
    return batch.rows(rank * share, (rank + 1) * share)


def train(run: Run) -> dict[str, list[float]]:
    """Metrics of every step, and of the held-out evaluation after the last as ``eval/...``."""
    setup = TrainingSetup(
        student=DirectoryProvider(run.student),
        objective=run.objective,
        teacher=DirectoryProvider(run.teacher),
        layer_map=run.layer_map,
    )
    engine = create_engine(setup, optim=OPTIM, engine=run.engine, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
    if run.load is not None:
        engine.load(run.load)
    metrics: dict[str, list[float]] = {}
    for step in range(run.first, run.end):
        batch = batch_of(step, engine.data_rank, engine.num_data_ranks)
        for name, value in engine.step(batch, lr=OPTIM.lr * (step + 1) / NUM_STEPS).items():
            metrics.setdefault(name, []).append(float(value))
        if run.save is not None and step + 1 == run.save_after:
            engine.save(run.save)
            write = engine.snapshot()
    if run.save is not None:
        _assert_written_as_then(write, run.save)
    held_out = torch.randint(0, 320, (3, SEQ_LEN), generator=torch.Generator().manual_seed(99))
    metrics |= {f"eval/{name}": [value] for name, value in engine.evaluate(held_out).items()}
    if run.export is not None:
        engine.export(run.export)
    return metrics


def _assert_written_as_then(write: Callable[[Path], None], saved: Path) -> None:
    """What is written after further steps is what was saved before them."""
    late = saved.with_name(f"{saved.name}_late")
    late.mkdir(exist_ok=True)
    write(late)
    distributed.barrier()
    files = sorted(path.relative_to(saved) for path in saved.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(late) for path in late.rglob("*.safetensors"))
    for file in files:
        expected, found = load_file(saved / file), load_file(late / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def train_together(*runs: Run) -> list[dict[str, list[float]]]:
    distributed.join()
    with distributed.together():
        return [train(run) for run in runs]


def refuse_then_train(foreign: Path, run: Run) -> dict[str, list[float]]:
    distributed.join()
    with distributed.together():
        with pytest.raises(ValueError, match=r"is no resume point of engine\.name=deepspeed"):
            train(replace(run, load=foreign))
        return train(run)


@pytest.fixture(scope="module")
def student_dir(heterogeneous_architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention-free, linear and dummy blocks; the head tied to the embeddings."""
    architecture = replace(heterogeneous_architecture, tie_embeddings=True)
    directory = tmp_path_factory.mktemp("student") / "model"
    save_model(build_model(architecture, seed=1), directory, architecture=architecture, tokenizer_from=None)
    return directory


@pytest.fixture(scope="module")
def reference(student_dir: Path, pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict]:
    """One process of the torch engine."""
    run = Run(
        engine=TORCH,
        student=student_dir,
        teacher=pico_parent_dir,
        layer_map=(0, 0, 1, 2, 2, 3),
        export=tmp_path_factory.mktemp("reference") / "model",
    )
    return run, train(run)


def weights(directory: Path | None) -> dict[str, Tensor]:
    assert directory is not None
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def assert_same_training(run: Run, metrics: dict, reference: tuple[Run, dict], *, rtol: float, atol: float) -> None:
    expected_run, expected = reference
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(values, rel=rtol), name
    found, start = weights(run.export), weights(expected_run.student)
    for name, tensor in weights(expected_run.export).items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (tensor - start[name]).abs().max() > 20 * atol, f"{name} has not moved enough to tell"


def assert_same_weights(found: Path | None, expected: Path | None) -> None:
    others = weights(found)
    for name, tensor in weights(expected).items():
        assert torch.equal(others[name], tensor), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_does_and_resumes_exactly(
    stage: int, reference: tuple[Run, dict], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    whole = replace(
        reference[0], engine=replace(ZERO, zero_stage=stage), save=point, save_after=12, export=tmp_path / "model"
    )
    rest = replace(whole, first=12, load=point, save=None, export=tmp_path / "resumed")
    first, second = run_in_processes(2, train_together, whole, rest)
    assert first == second
    assert_same_training(whole, first[0], reference, rtol=RTOL, atol=ATOL)
    assert first[1]["loss"] == first[0]["loss"][12:]
    assert_same_weights(rest.export, whole.export)


def test_state_goes_on_under_another_stage_and_number_of_processes(
    reference: tuple[Run, dict], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    points = tmp_path / "one", tmp_path / "two"
    for point in points:
        point.mkdir()
    start = replace(reference[0], engine=replace(ZERO, zero_stage=2), end=5, save=points[0], save_after=5, export=None)
    middle = replace(
        start, engine=replace(ZERO, zero_stage=3), first=5, end=10, load=points[0], save=points[1], save_after=10
    )
    rest = Run(
        engine=replace(ZERO, zero_stage=1),
        student=start.student,
        teacher=start.teacher,
        layer_map=start.layer_map,
        first=10,
        load=points[1],
        export=tmp_path / "model",
    )
    by_rank = run_in_processes(2, train_together, start, middle)
    (last,) = run_in_processes(1, refuse_then_train, tmp_path, rest)
    runs = [*by_rank[0], last]
    metrics = {name: [value for run in runs for value in run[name]] for name in reference[1] if "/" not in name}
    held_out = {name: values for name, values in last.items() if "/" in name}
    assert_same_training(rest, metrics | held_out, reference, rtol=RTOL, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 2, "offload_optimizer": True, "recompute": True},
        {"zero_stage": 3, "offload_optimizer": True, "recompute": True, "ffn_tile_tokens": 8},
        {"zero_stage": 2, "sequence_parallel": 2},
        {"zero_stage": 3, "sequence_parallel": 2, "recompute": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_change_nothing(
    options: dict, reference: tuple[Run, dict], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    run = replace(reference[0], engine=replace(ZERO, **options), export=tmp_path / "model")
    (metrics,), _ = run_in_processes(2, train_together, run)
    assert_same_training(run, metrics, reference, rtol=RTOL, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_of_bf16_weights_start_as_stored_and_resume_exactly(
    stage: int, reference: tuple[Run, dict], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    engine = replace(ZERO, zero_stage=stage, precision="bf16")
    untrained = replace(reference[0], engine=engine, end=0, export=tmp_path / "untrained")
    whole = replace(untrained, end=6, save=point, save_after=3, export=tmp_path / "model")
    rest = replace(whole, first=3, load=point, save=None, export=tmp_path / "resumed")
    by_rank = run_in_processes(2, train_together, untrained, whole, rest)
    assert by_rank[0] == by_rank[1]
    # bf16 keeps 8 bits; a mean over 128 positions averages some of the rounding away.
    assert by_rank[0][1]["loss"] == pytest.approx(reference[1]["loss"][:6], rel=5e-3)
    assert_same_weights(untrained.export, untrained.student)
    assert_same_weights(rest.export, whole.export)
    assert by_rank[0][2]["loss"] == by_rank[0][1]["loss"][3:]


def test_a_missing_package_is_named_with_its_extra(
    reference: tuple[Run, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"engine\.name=deepspeed needs .*ffn-fusion\[deepspeed\]"):
        train(replace(reference[0], engine=ZERO))


class CountingProvider(DirectoryProvider):
    """Notes what is read, tensor by tensor, and refuses to load a whole model."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[str] = []

    def load(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        raise AssertionError("a rank loads the whole model")

    def read(self, name: str, rows: range | None = None) -> Tensor:
        self.reads.append(name)
        return super().read(name, rows)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
def test_ranks_read_the_rows_of_their_elements_alone(shape: tuple[int, ...], num_ranks: int) -> None:
    """Together all elements, padded; each rank at most one row more at either end than its elements fill."""
    whole = torch.arange(1.0, prod(shape) + 1).reshape(shape)
    size = -(-whole.numel() // num_ranks)
    read: list[range] = []

    def read_rows(rows: range) -> Tensor:
        assert 0 <= rows.start < rows.stop <= shape[0]
        read.append(rows)
        return whole[rows.start : rows.stop]

    parts = [read_elements(read_rows, shape, start=rank * size, size=size) for rank in range(num_ranks)]
    assert {len(part) for part in parts} == {size}
    assert torch.equal(torch.cat(parts)[: whole.numel()], whole.flatten())
    assert not torch.cat(parts)[whole.numel() :].any()
    row_size = prod(shape[1:])
    assert all(len(rows) * row_size < size + 2 * row_size for rows in read)


def build_and_export(student: Path, out: Path) -> list[str]:
    distributed.join()
    with distributed.together():
        provider = CountingProvider(student)
        setup = TrainingSetup(student=provider, objective=ObjectiveConfig(lm=1.0))
        engine = create_engine(
            setup, optim=OPTIM, engine=replace(ZERO, zero_stage=3), batch_size=BATCH_SIZE, seq_len=SEQ_LEN
        )
        engine.export(out)
    return provider.reads


def test_stage_3_is_built_tensor_by_tensor_by_the_first_rank(
    student_dir: Path, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    first, second = run_in_processes(2, build_and_export, student_dir, tmp_path / "model")
    assert sorted(first) == sorted(weights(student_dir))
    assert second == []
    assert_same_weights(tmp_path / "model", student_dir)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_head_that_no_term_trains_stays_as_it_is(
    stage: int, pico_parent_dir: Path, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    run = Run(
        engine=replace(ZERO, zero_stage=stage),
        student=pico_parent_dir,
        teacher=pico_parent_dir,
        layer_map=(0, 0, 0, 3),
        objective=ObjectiveConfig(hidden_cosine=1.0, chunk_tokens=16),
        end=2,
        export=tmp_path / "model",
    )
    run_in_processes(1, train_together, run)
    start, found = weights(run.student), weights(run.export)
    assert torch.equal(found["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"offload_optimizer": True, "recompute": True}], ids=["plain", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_train_as_one_process_does(
    stage: int, options: dict, reference: tuple[Run, dict], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    engine = replace(ZERO, device="cuda", zero_stage=stage, **options)
    run = replace(reference[0], engine=engine, export=tmp_path / "model")
    (metrics,), _ = run_in_processes(2, train_together, run)
    # The GPU's exponentials and roots differ from the CPU's in the last bits.
    assert_same_training(run, metrics, reference, rtol=5e-4, atol=2e-4)
