"""The training stages come out the same however many processes share them, and whatever the engine deals over them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distill.data.batch import Batch
from distill.data.dataset import Batches, TokenDataset
from distill.engine.student_step import StudentStep
from distill.objective import Totals
from launch.__main__ import main
from puzzle.model.checkpoint import TensorReader, read_architecture
from tests.distributed.conftest import TIMEOUT_SECONDS, RunInProcesses
from tests.launch.training_inputs import write_data, write_student, write_teacher

METRIC_TOLERANCE = 2e-4
"""Relative. Only the order of sums differs."""
WEIGHT_TOLERANCE = 5e-4
"""Absolute, one step at the peak learning rate: AdamW makes a whole step of a gradient that is a rounding error."""
ENGINE = "engine=torch engine.device=cpu optim.lr=5e-4 objective.chunk_tokens=64"
STAGES = {
    "distill": "distill.max_tokens=1280 distill.seq_len=16 distill.batch_size=4 distill.eval_sequences=4 "
    "distill.eval_every_tokens=512",
    "extend_context": "objective=lm extend_context.eval_sequences=2 extend_context.phases=["
    "{seq_len:32,max_tokens:512,batch_size:2},{seq_len:512,max_tokens:2048,batch_size:2,rope:{theta:40000.0}}]",
    "pretrain": "pretrain.num_blocks=2 pretrain.hidden_dim=32 pretrain.num_heads=2 pretrain.num_kv_heads=1 "
    "pretrain.ffn_dim=256 pretrain.max_positions=32 pretrain.optim.lr=5e-4 pretrain.train.max_tokens=2048 "
    "pretrain.train.seq_len=32 pretrain.train.batch_size=4 pretrain.train.eval_sequences=8",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage left."""

    path: Path
    rows: list[dict[str, float]]
    manifest: dict


@pytest.fixture(scope="module")
def inputs(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The inputs of every stage, as overrides."""
    root = tmp_path_factory.mktemp("inputs")
    data = write_data(root / "data", pico_parent_dir).path
    teacher = write_teacher(root / "teacher", pico_parent_dir).path
    student = write_student(root / "student", teacher, dtype=torch.float32).path
    given = {
        "distill": {"student": student, "teacher": teacher, "data": data},
        "extend_context": {"student": student, "data": data},
        "pretrain": {"data": data},
    }
    return {stage: [f"inputs.{name}={path}" for name, path in paths.items()] for stage, paths in given.items()}


def launch(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        return main(arguments), err.getvalue()


def arguments(stage: str, root: Path, inputs: dict[str, list[str]], *further: str) -> list[str]:
    return [stage, f"run.root={root}", *ENGINE.split(), *STAGES[stage].split(), *inputs[stage], *further]


def outcome(stage: str, root: Path) -> Outcome:
    (path,) = (root / "store").glob(f"{stage}-*")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return Outcome(path=path, rows=rows, manifest=json.loads((path / "artifact.json").read_text()))


@pytest.fixture(scope="module")
def alone(inputs: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every stage in one process."""
    outcomes = {}
    for stage in STAGES:
        root = tmp_path_factory.mktemp(stage)
        status, said = launch(arguments(stage, root, inputs))
        assert status == 0, said
        outcomes[stage] = outcome(stage, root)
    return outcomes


def assert_same(found: Outcome, expected: Outcome, tolerance: float = METRIC_TOLERANCE) -> None:
    assert [row["tokens"] for row in found.rows] == [row["tokens"] for row in expected.rows]
    for row, wanted in zip(found.rows, expected.rows, strict=True):
        # Times are of the machine.
        names = {name for name in wanted if name.startswith(("eval/", "train/", "optim/"))}
        assert names == {name for name in row if name.startswith(("eval/", "train/", "optim/"))}
        for name in names:
            assert row[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-6), name
    assert read_architecture(found.path) == read_architecture(expected.path)
    with TensorReader(found.path) as one, TensorReader(expected.path) as other:
        assert one.names() == other.names()
        for name in other.names():
            torch.testing.assert_close(one.read(name), other.read(name), rtol=0, atol=WEIGHT_TOLERANCE)
    assert found.manifest["tokens"] == expected.manifest["tokens"]
    assert found.manifest["headline"] == expected.manifest["headline"]


@pytest.mark.parametrize(
    ("stage", "further"),
    [
        ("distill", ()),
        ("distill", ("engine.shard=true",)),
        ("distill", ("engine.sequence_parallel=2", "engine.recompute=true")),
        pytest.param("distill", ("engine.name=deepspeed",), marks=pytest.mark.slow),
        pytest.param("distill", ("engine.name=deepspeed", "engine.zero_stage=3"), marks=pytest.mark.slow),
        ("extend_context", ()),
        ("pretrain", ()),
    ],
)
def test_two_processes_give_what_one_does(
    stage: str,
    further: tuple[str, ...],
    inputs: dict[str, list[str]],
    alone: dict[str, Outcome],
    tmp_path: Path,
    run_in_processes: RunInProcesses,
) -> None:
    if "engine.name=deepspeed" in further:
        pytest.importorskip("deepspeed")
    results = run_in_processes(2, launch, arguments(stage, tmp_path, inputs, *further))
    assert [status for status, _ in results] == [0, 0], results
    assert_same(outcome(stage, tmp_path), alone[stage])


def test_two_nodes_give_what_one_process_does(
    inputs: dict[str, list[str]], alone: dict[str, Outcome], tmp_path: Path
) -> None:
    """Two agents of torchrun meet as those of two nodes do; here they share a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-id=two_nodes", f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"]
    command = [*torchrun, *meeting, "-m", "launch", *arguments("distill", tmp_path, inputs, "engine.shard=true")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        said = [agent.communicate(timeout=TIMEOUT_SECONDS) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sorted(out.count("artifact: ") for out, _ in said) == [0, 1]
    assert_same(outcome("distill", tmp_path), alone["distill"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize(
    "engine",
    [
        "torch_bf16",
        "torch_fsdp",
        "deepspeed_zero2",
        "deepspeed_zero3",
        "megatron",
        "megatron engine.tensor_parallel=1 engine.pipeline_parallel=2",
    ],
)
def test_two_gpus_give_what_a_cpu_does(
    engine: str,
    inputs: dict[str, list[str]],
    alone: dict[str, Outcome],
    tmp_path: Path,
    run_in_processes: RunInProcesses,
) -> None:
    """In fp32; kernels of a GPU add in another order, 20 steps of AdamW long."""
    pytest.importorskip(engine.partition("_")[0].partition(" ")[0].replace("megatron", "megatron.core"))
    further = [f"engine={engine.split()[0]}", "engine.precision=fp32", "engine.compile=false", *engine.split()[1:]]
    base = [text for text in arguments("distill", tmp_path, inputs) if not text.startswith("engine")]
    results = run_in_processes(2, launch, [*base, *further])
    assert [status for status, _ in results] == [0, 0], results
    assert_same(outcome("distill", tmp_path), alone["distill"], tolerance=5e-3)


@pytest.mark.parametrize(
    ("stage", "further", "message"),
    [
        (
            "distill",
            ("distill.batch_size=5",),
            "distill.batch_size=5 cannot be dealt evenly over 2 data ranks (2 processes); set distill.batch_size=4 or "
            "6, or start 1 process",
        ),
        (
            "extend_context",
            ("engine.sequence_parallel=4",),
            "engine.sequence_parallel=4 needs a multiple of 4 processes, got 2; set engine.sequence_parallel=2",
        ),
        (
            "pretrain",
            ("engine.sequence_parallel=2", "pretrain.num_heads=1"),
            "engine.sequence_parallel=2: it does not divide the 1 attention heads of the model; "
            "set engine.sequence_parallel=1",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused_once_before_anything_is_loaded(
    stage: str,
    further: tuple[str, ...],
    message: str,
    inputs: dict[str, list[str]],
    tmp_path: Path,
    run_in_processes: RunInProcesses,
) -> None:
    results = run_in_processes(2, launch, arguments(stage, tmp_path, inputs, *further))
    assert [status for status, _ in results] == [2, 2]
    assert sum(message in said for _, said in results) == 1, results
    assert not list(tmp_path.glob(f"store/{stage}-*/config.json"))


def launch_poisoned(arguments: list[str], metric: str, step_tokens: int, sequence: int) -> tuple[int, str]:
    """One sequence, in steps of ``step_tokens``, makes ``metric`` not a number, in the process that has it."""
    forward = StudentStep.forward

    def poisoned(self: StudentStep, batch: Batch, totals: Totals | None) -> Any:
        found = forward(self, batch, totals)
        if totals is None or totals.num_positions != step_tokens or sequence not in batch.sequence_ids:
            return found
        loss, metrics = found
        if metric == "train/loss":
            return loss * math.nan, {**metrics, "loss": metrics["loss"] * math.nan}
        # The root's slope at 0 is infinite, and 0 times it is no number.
        return loss + (0 * loss).sqrt(), metrics

    with mock.patch.object(StudentStep, "forward", poisoned):
        return launch(arguments)


def assert_all_end_with_one_line(results: list[tuple[int, str]], said: str) -> None:
    assert [status for status, _ in results] == [2, 2], results
    # Behind what the progress bar leaves.
    _, line = results[0][1].split("error: ")
    assert re.fullmatch(f"{said}\n", line), line
    assert results[1][1] == ""


FURTHER_BAD_STEPS = [
    ("optim/grad_norm", ()),
    ("train/loss", ("engine.shard=true",)),
    *(
        (metric, ("engine.name=deepspeed", f"engine.zero_stage={stage}"))
        for metric in ("train/loss", "optim/grad_norm")
        for stage in (2, 3)
    ),
]


@pytest.mark.parametrize(
    ("metric", "further"),
    [
        ("train/loss", ()),
        ("optim/grad_norm", ("engine.shard=true",)),
        ("train/loss", ("engine.sequence_parallel=2",)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER_BAD_STEPS),
    ],
)
def test_what_is_not_a_number_ends_all_processes_at_one_step_with_one_line(
    metric: str,
    further: tuple[str, ...],
    inputs: dict[str, list[str]],
    alone: dict[str, Outcome],
    tmp_path: Path,
    run_in_processes: RunInProcesses,
) -> None:
    """A text that spoils step 15 of 20, read by the second process. Without it, the same command goes on."""
    if "engine.name=deepspeed" in further:
        pytest.importorskip("deepspeed")
    data = Path(inputs["pretrain"][0].partition("=")[2])
    batches = Batches(TokenDataset.open(data).split("train"), seq_len=16, batch_size=4, seed=0)
    read = batches.batch(14).sequence_ids.tolist()
    command = arguments("distill", tmp_path, inputs, *further)
    spans = ", ".join(f"{16 * index}-{16 * index + 15}" for index in read)
    where = f"sequences {', '.join(map(str, read))} of 16 tokens of {data}/train.npy: tokens {spans}"
    point = rf"last good resume point: {tmp_path}/store/\.resume/\S+/step_14"
    assert_all_end_with_one_line(
        run_in_processes(2, launch_poisoned, command, metric, 64, read[3]),
        rf"distill\S+: {metric} is (nan|inf) at step 15 \(1,060 tokens\), on {where}; {point}; .*",
    )
    results = run_in_processes(2, launch, command)
    assert [status for status, _ in results] == [0, 0], results
    assert_same(outcome("distill", tmp_path), alone["distill"])


def test_a_later_phase_names_its_stretch_of_the_split(
    inputs: dict[str, list[str]], alone: dict[str, Outcome], tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    """The second phase reads what the first one's 512 tokens leave, in sequences of 512."""
    data = Path(inputs["pretrain"][0].partition("=")[2])
    stretch = TokenDataset.open(data).split("train").beyond(512)
    read = Batches(stretch, seq_len=512, batch_size=2, seed=1, num_sequences=4).batch(1).sequence_ids.tolist()
    command = arguments("extend_context", tmp_path, inputs)
    spans = ", ".join(f"{512 + 512 * index}-{512 + 512 * index + 511}" for index in read)
    where = f"sequences {read[0]}, {read[1]} of 512 tokens, counted from token 512 on, of {data}/train.npy"
    assert_all_end_with_one_line(
        run_in_processes(2, launch_poisoned, command, "train/loss", 1024, read[1]),
        rf".*: train/loss is nan at step 2 \(\S+ tokens\), on {where}: tokens {spans}; last good .*/step_1; .*",
    )
    results = run_in_processes(2, launch, command)
    assert [status for status, _ in results] == [0, 0], results
    assert_same(outcome("extend_context", tmp_path), alone["extend_context"])


def test_a_sweep_goes_on_after_a_run_that_diverged(
    inputs: dict[str, list[str]], alone: dict[str, Outcome], tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    """All processes are still there for the next run."""
    results = run_in_processes(2, launch, arguments("distill", tmp_path, inputs, "optim.lr=1e30,5e-4", "--multirun"))
    assert [status for status, _ in results] == [2, 2], results
    assert (
        len(
            re.findall(r"error: .* is (?:nan|inf) at step \d+ .* no resume point of this training yet: ", results[0][1])
        )
        == 1
    )
    assert results[1][1] == ""
    (made,) = tmp_path.glob("**/store/distill-*/artifact.json")
    assert json.loads(made.read_text())["headline"] == alone["distill"].manifest["headline"]
