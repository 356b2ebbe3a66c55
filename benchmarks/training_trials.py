"""Training steps of random models in fresh processes, for benchmarks of engines, layouts and lengths.

As a program it is one process of a trial, which torchrun starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig
from distill.data.batch import Batch
from distill.engine.base import create_engine
from distill.engine.dealing import StepShape
from distill.engine.layout import check_layout
from distill.engine.setup import TrainingSetup
from distill.files import write_whole
from launch.training import paired_blocks
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, read_architecture
from puzzle.model.parallelism import refuses
from puzzle.model.provider import DirectoryProvider
from puzzle.model.stats import num_params
from puzzle.model.tensor_layout import tensor_shapes

GPU_MEMORY, HOST_MEMORY, TIME = "GPU memory", "host memory", "time"
"""What a trial may fail for; anything else is an error in its own words."""
TERMINATION_S = 60
"""Twice what torchrun gives its workers to end before it kills them."""
SAMPLE_S = 0.2
"""Seconds between two looks at the host's free memory."""
_NUM_RANDOM_VALUES = 2**24


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some optimizer steps on random tokens."""

    student: str
    """Model directory."""
    teacher: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of EngineConfig."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Fields of ObjectiveConfig."""
    batch_size: int
    """Sequences of a step, over all processes."""
    seq_len: int
    warmup_steps: int = 0
    """Steps before those that are timed."""
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial took, or why it failed."""

    failure: str | None = None
    step_s: tuple[float, ...] = ()
    """Time of every timed step, from one synchronisation with the device to the next; of the slowest process."""
    losses: tuple[float, ...] = ()
    """Of every step, before it, warm-up included."""
    gpu_peak_bytes: int = 0
    """Allocated, of the fullest process."""
    gpu_reserved_bytes: int = 0
    host_resident_bytes: int = 0
    """Peak of resident memory, summed over the processes. Pinned memory, which the driver maps, need not be in it, and
    checkpoint files that are mapped are."""
    host_taken_bytes: int = 0
    """What the host had available before the trial less the least that it had during it, sampled. Pinned memory is in
    it, file pages that the system may drop are not; what else runs on the host is."""
    device: str = ""


def write_random_model(directory: Path, architecture: Architecture) -> None:
    """A model directory in bf16 with norms of 1 and matrices from one pool of normal numbers. None if it stands."""
    if (directory / "config.json").exists():
        return
    pool = torch.randn(_NUM_RANDOM_VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with CheckpointWriter(directory, architecture, dtype=torch.bfloat16) as writer:
        for index, (name, shape) in enumerate(tensor_shapes(architecture).items()):
            writer.add(name, torch.ones(shape) if len(shape) == 1 else _filled(shape, pool.roll(7919 * index)))


def _filled(shape: tuple[int, ...], pool: Tensor) -> Tensor:
    num_values = shape[0] * shape[1]
    return pool.repeat(-(-num_values // len(pool)))[:num_values].view(shape)


def run_trial(trial: Trial, *, num_processes: int, timeout_s: float) -> Outcome:
    """Run ``trial`` behind torchrun. It is stopped after ``timeout_s``."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "trial.json").write_text(json.dumps(asdict(trial)))
        before = available_host_bytes()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, __file__, str(directory)], env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                least = watch(process, timeout_s)
            finally:
                in_time = process.poll() is not None
                _stop(process)
        reports = [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]
        log_text = (directory / "log").read_text()
        outcome = _outcome(reports, log_text, num_processes) if in_time else Outcome(failure=TIME)
        return replace(outcome, host_taken_bytes=max(0, before - least))


def watch(process: subprocess.Popen, timeout_s: float) -> int:
    """Wait for the end of ``process`` or the timeout; the least available memory of the host meanwhile, in bytes."""
    deadline = time.monotonic() + timeout_s
    least = available_host_bytes()
    while time.monotonic() < deadline:
        try:
            process.wait(timeout=SAMPLE_S)
            break
        except subprocess.TimeoutExpired:
            least = min(least, available_host_bytes())
    return least


def available_host_bytes() -> int:
    """Memory that the host can give without swapping, mapped and cached files that it may drop included."""
    return meminfo_bytes("MemAvailable")


def meminfo_bytes(name: str) -> int:
    """One line of the kernel's ``/proc/meminfo``."""
    return _kib_line(Path("/proc/meminfo"), name)


def _kib_line(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _stop(process: subprocess.Popen) -> None:
    """End the trial and all of its processes.

    torchrun gives each of its workers a session of its own, which no signal to torchrun's reaches. Asked to end, it
    ends them.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=TERMINATION_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(reports: list[dict[str, Any]], log: str, num_processes: int) -> Outcome:
    failures = [report["failure"] for report in reports if report["failure"]]
    if failures:
        return Outcome(failure=failures[0])
    if len(reports) < num_processes:
        killed = "SIGKILL" in log or "exitcode: -9" in log or "exitcode  : -9" in log
        lines = [line for line in log.splitlines() if "rror" in line]
        return Outcome(failure=HOST_MEMORY if killed else (lines[-1].strip() if lines else "ended without a word"))
    return Outcome(
        step_s=tuple(max(times) for times in zip(*(report["step_s"] for report in reports), strict=True)),
        losses=tuple(reports[0]["losses"]),
        gpu_peak_bytes=max(report["gpu_peak_bytes"] for report in reports),
        gpu_reserved_bytes=max(report["gpu_reserved_bytes"] for report in reports),
        host_resident_bytes=sum(report["host_resident_bytes"] for report in reports),
        device=reports[0]["device"],
    )


def main() -> None:
    """One process of a trial."""
    directory = Path(sys.argv[1])
    trial = Trial(**json.loads((directory / "trial.json").read_text()))
    report: dict[str, Any] = {"failure": None}
    try:
        distributed.join()
        with distributed.together():
            report |= _measure(trial)
    except Exception as error:
        report["failure"] = _reason(error)
    write_whole(directory / f"rank-{os.environ['RANK']}.json", json.dumps(report))
    # Not through the interpreter's end: it may wait for processes that wait for this one.
    os._exit(1 if report["failure"] else 0)


def _measure(trial: Trial) -> dict[str, Any]:
    engine = EngineConfig(**trial.engine)
    student = DirectoryProvider(Path(trial.student))
    teacher = None if trial.teacher is None else DirectoryProvider(Path(trial.teacher))
    world_size, batch_size, seq_len = distributed.world_size(), trial.batch_size, trial.seq_len
    shape = StepShape(node="trial", batch_size=batch_size, seq_len=seq_len)
    models = [refuses(model.architecture) for model in (student, teacher) if model is not None]
    check_layout(engine, world_size=world_size, steps=[shape], models=models)
    objective = ObjectiveConfig(**trial.objective)
    pairs = () if teacher is None else paired_blocks(student.architecture, teacher.architecture, objective)
    setup = TrainingSetup(student=student, objective=objective, teacher=teacher, layer_map=pairs)
    runner = create_engine(setup, optim=OptimConfig(lr=1e-5), engine=engine, batch_size=batch_size, seq_len=seq_len)
    share = batch_size // runner.num_data_ranks
    rows = slice(runner.data_rank * share, (runner.data_rank + 1) * share)
    times, losses = [], []
    for step in range(trial.warmup_steps + trial.steps):
        tokens = torch.randint(
            student.architecture.vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(step)
        )
        _synchronize(runner.device)
        start = time.perf_counter()
        metrics = runner.step(Batch.of(tokens[rows]), lr=1e-5)
        _synchronize(runner.device)
        times.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    on_gpu = runner.device.type == "cuda"
    return {
        "step_s": times[trial.warmup_steps :],
        "losses": losses,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host_resident_bytes": _kib_line(Path("/proc/self/status"), "VmHWM"),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return GPU_MEMORY
    # Pinned memory that the system does not have is an error of CUDA, pageable memory one of torch's allocator.
    if isinstance(error, MemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text:
        return HOST_MEMORY
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def shape_text(directory: Path) -> str:
    """``1.24B parameters, 16 blocks, 16 attentions`` of a model directory."""
    blocks = read_architecture(directory).blocks
    num_attentions = sum(not block.attention.is_no_op for block in blocks)
    return f"{num_params_text(directory)} parameters, {len(blocks)} blocks, {num_attentions} attentions"


def num_params_text(directory: Path) -> str:
    """``1.24B``: parameters of a model directory."""
    millions = num_params(read_architecture(directory)) / 1e6
    return f"{millions / 1000:.2f}B" if millions >= 1000 else f"{millions:.2f}M"


if __name__ == "__main__":
    main()
