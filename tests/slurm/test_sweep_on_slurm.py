"""Sweeps through a real Slurm: every point as one job of a launcher, and every point as a chain of jobs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.sweep import Sweep, is_sweep
from tests.launch.pico_sweep import pico_overrides
from tests.slurm.conftest import Cluster, launch, site_file, wait_for

pytestmark = pytest.mark.slurm

PIPELINE = "attention_fusion"
REMOVED = "prune_attention.num_attentions=3"


def the_sweep(root: Path) -> Sweep:
    (path,) = [path for path in root.iterdir() if is_sweep(path)]
    return Sweep.read(path)


def page_of(sweep: Sweep) -> dict[str, Any]:
    assert (sweep.path / "report" / "index.html").is_file()
    return json.loads((sweep.path / "report" / "runs.json").read_text())


def test_submitit_runs_every_point_as_a_job_and_the_page_follows(
    cluster: Cluster, pico_parent_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"]
    swept = ["optim.lr=1e-3", f"{REMOVED},9"]
    command = ["launch", PIPELINE, "--multirun", *pico_overrides(pico_parent_dir, tmp_path), *swept, *launcher]
    done = launch(cluster, *command)
    assert done.returncode == 2, f"the parent has no nine attentions to remove: {done.stdout}{done.stderr}"
    runs = page_of(the_sweep(tmp_path))
    assert [row["number"] for row in runs["groups"][0]["runs"]] == [1]
    assert list(runs["unfinished"]) == ["2: prune_attention.num_attentions=9"]
    assert f"1| run 1 of 2: {REMOVED}" in "".join(
        log.read_text() for log in tmp_path.glob(".sweep/.submitit/*/*_log.out")
    )


def test_chains_share_what_they_have_in_common_and_a_last_job_writes_the_page(
    cluster: Cluster, pico_parent_dir: Path, tmp_path: Path
) -> None:
    own = ("benchmark.repeats=", "evaluate.num_sequences=")
    base = [REMOVED, *(text for text in pico_overrides(pico_parent_dir, tmp_path) if not text.startswith(own))]
    before = launch(cluster, "launch", PIPELINE, *base, "benchmark.repeats=1", "evaluate.num_sequences=4")
    assert before.returncode == 0, before.stderr
    swept = ["evaluate.num_sequences=5", "benchmark.repeats=2,3"]
    command = ["launch", PIPELINE, "--multirun", *base, *swept, "cluster=slurm", "cluster.gpus_per_node=1"]
    done = launch(cluster, *command, FUSION_SITE=site_file(tmp_path))
    assert done.returncode == 0, done.stderr
    sweep = the_sweep(tmp_path)
    assert f"writes {sweep.path}/report/index.html when all of them have ended" in done.stdout
    first, second = (json.loads((point.run / "slurm/jobs.json").read_text()) for point in sweep.points)
    assert list(first) == list(second) == ["evaluation", "speed"], "the rest was there"
    waits = rf"evaluation +{second['evaluation']} +1 +{first['evaluation']}\b"
    assert re.search(waits, done.stdout), "the second waits for the first"

    (page,) = json.loads((sweep.path / "slurm/jobs.json").read_text()).values()
    wait_for("the last job", lambda: not cluster.command("squeue", "--noheader", "--format=%A").split(), 180)
    assert "JobState=COMPLETED" in cluster.command("scontrol", "show", "job", page)
    runs = page_of(sweep)
    assert runs["unfinished"] == {}
    assert runs["columns"] == ["benchmark.repeats"]
    assert [row["number"] for row in runs["groups"][0]["runs"]] == [1, 2]
    logs = "".join(log.read_text() for point in sweep.points for log in point.run.glob("logs/*/latest/node_0.log"))
    assert logs.count("evaluation") == 2
    assert "waiting for it" not in logs, "no job holds a node while another computes the same"
