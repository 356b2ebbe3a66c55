"""The whole chain through a real Slurm: submitted, killed, stopped by the time limit, and finished all the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster, launch, site_file, wait_for

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
PIPELINE = "attention_fusion"
SETTINGS = (
    "run.name=pico",
    "data=text",
    "data.train_tokens=100000",
    "data.validation_tokens=20000",
    "data.calibration_tokens=20000",
    "engine.device=cpu",
    "workload.prefill_tokens=8",
    "workload.generated_tokens=8",
    "prune_attention.num_attentions=3",
    "prune_attention.num_sequences=4",
    "prune_attention.seq_len=64",
    "dependency.num_sequences=4",
    "dependency.seq_len=64",
    "distill.max_tokens=200000",
    "distill.data_end=repeat",
    "distill.seq_len=64",
    "distill.batch_size=8",
    "distill.eval_sequences=8",
    "distill.resume_every_tokens=10000",
    "evaluate.seq_len=64",
    "evaluate.num_sequences=4",
    "benchmark.repeats=2",
    "benchmark.warmup=1",
)
ON_SLURM = (
    "cluster=slurm",
    "cluster.nodes=2",
    "cluster.gpus_per_node=1",
    "cluster.time_limit=00:20:00",
    "cluster.signal_seconds=20",
)


@pytest.fixture
def settings(pico_parent_dir: Path, tmp_path: Path) -> list[str]:
    """Of a pico pipeline on the source of a package of the standard library."""
    text = tmp_path / "text"
    shutil.copytree(Path(json.__file__).parents[1] / "asyncio", text, ignore=shutil.ignore_patterns("__pycache__"))
    return [*SETTINGS, f"model.source={pico_parent_dir}", f"data.sources.0.path={text}"]


def rank_processes(run: Path) -> list[int]:
    """The ranks of the distillation under ``run``: torchrun's children, not torchrun."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "--step" in words and f"run.root={run}" in words and "torch.distributed.run" not in words:
                is_distilling = words[words.index("--step") + 1] == "distilled"
                found += [int(entry.name)] if is_distilling and words[0] != "bash" else []
    return sorted(found)


def newest_step(run: Path) -> int:
    points = run.glob("store/.resume/distill-*/step_*")
    return max((int(p.name.removeprefix("step_")) for p in points if p.suffix != ".tmp"), default=0)


def weights(run: Path) -> dict[str, str]:
    manifest = json.loads(next(run.glob("*/distilled/artifact.json")).read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"].endswith(".safetensors")}


def test_killed_and_out_of_time_the_chain_ends_with_the_weights_of_an_uninterrupted_run(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    # From a small job, as `sbatch launch/ultra.sh` does it: what that job was given must not reach the others.
    command = [sys.executable, "-m", "launch", PIPELINE, *settings, *ON_SLURM, f"run.root={rough}"]
    sbatch = ["sbatch", "--wait", f"--chdir={ROOT}", f"--output={tmp_path / 'submission.log'}", "--nodes=2"]
    submission = {"FUSION_SITE": site_file(tmp_path), "OMP_NUM_THREADS": "1"}
    cluster.command(*sbatch, f"--wrap={shlex.join(command)}", **submission)
    run, job = rough / "pico", json.loads((rough / "pico/slurm/jobs.json").read_text())["distilled"]
    log = run / "logs/distilled/job.log"
    refused = launch(
        cluster, "launch", PIPELINE, *settings, *ON_SLURM, f"run.root={rough}", FUSION_SITE=site_file(tmp_path)
    )
    assert refused.returncode == 2
    assert "has jobs in the queue" in refused.stderr

    first = wait_and_kill(rough, log)
    strike_while_frozen(cluster, job, rough, log, beyond=first)
    # While the last jobs run: the same two processes, without Slurm.
    reference = launch(
        cluster,
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "launch",
        PIPELINE,
        *settings,
        f"run.root={calm}",
    )
    assert reference.returncode == 0, reference.stderr[-2000:]
    wait_for("the whole run", (run / "report").exists, 120)

    assert weights(rough) == weights(calm)
    assert len(weights(rough)) > 0
    told = log.read_text()
    assert told.count("queued again") == 2
    assert "told to stop, 20 s before the limit" in told
    assert "stopped with its state saved; queued again" in told
    attempts = sorted(path.name for path in (run / "logs/distilled").glob("attempt_*"))
    assert attempts == ["attempt_1", "attempt_2", "attempt_3"]
    assert (run / "logs/distilled/latest").resolve().name == "attempt_3"
    wait_for("an empty queue", lambda: not cluster.command("squeue", "--noheader").strip(), 20)


def wait_and_kill(root: Path, log: Path) -> int:
    """Kill a rank in the middle of the distillation, as a node that dies would. Returns the resume point it has."""
    wait_for("a resume point", lambda: newest_step(root) > 0, 180)
    step = newest_step(root)
    os.kill(rank_processes(root)[-1], signal.SIGKILL)
    wait_for("the first requeue", lambda: "failure 1 of at most 5, queued again" in log.read_text(), 20)
    return step


def strike_while_frozen(cluster: Cluster, job: str, root: Path, log: Path, *, beyond: int) -> None:
    """Hold the resumed distillation until the time limit's signal has come, then let it go on."""
    wait_for("the second attempt", lambda: len(rank_processes(root)) == 2 and newest_step(root) > beyond, 90)
    frozen = rank_processes(root)
    for process in frozen:
        os.kill(process, signal.SIGSTOP)
    try:
        # In whole minutes, and beyond the time of its signal: where the limit has passed Slurm kills the job at once.
        limit = (run_seconds(cluster, job) + 30) // 60 + 1
        cluster.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        wait_for("the signal before the limit", lambda: "told to stop" in log.read_text(), 120)
    finally:
        for process in frozen:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
    wait_for("the second requeue", lambda: log.read_text().count("queued again") == 2, 30)
    wait_for("its turn", lambda: "PENDING" in cluster.command("scontrol", "show", "job", job), 30)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=20")


def run_seconds(cluster: Cluster, job: str) -> int:
    """Seconds since the job's latest start."""
    shown = dict(field.partition("=")[::2] for field in cluster.command("scontrol", "show", "job", job).split())
    hours, minutes, seconds = shown["RunTime"].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def test_a_partition_that_slurm_does_not_know_is_refused_in_its_own_words(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    refused = launch(
        cluster,
        "launch",
        PIPELINE,
        *settings,
        *ON_SLURM,
        f"run.root={tmp_path / 'runs'}",
        FUSION_SITE=site_file(tmp_path, partition="gpus"),
    )
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "invalid partition specified: gpus" in refused.stderr
    assert "nothing was submitted" in refused.stderr


def test_the_script_of_a_large_pipeline_is_a_job(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Away from the repository only the directory of submission says where it is.
    sbatch = ["sbatch", "--wait", f"--chdir={ROOT}", f"--output={log}", "launch/llama_8b.sh", "--dry-run"]
    variables = {"FUSION_SITE": site_file(tmp_path), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    cluster.command(*sbatch, f"run.root={tmp_path / 'runs'}", **variables)
    assert log.read_text().count("#SBATCH --signal=B:USR2@300") == 9
    assert not (tmp_path / "runs").exists()
