"""Two processes that need the same artifacts at the same time, through the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import filelock

from launch.commands import run_places
from launch.config import compose_pipeline
from launch.pipeline import plan
from tests.launch.pico_sweep import pico_overrides

SHARED = ["parent", "data", "pruned", "dependency", "fused"]
OWN = ["distilled", "evaluation", "speed", "exported"]


def start(overrides: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-u", "-m", "launch", "attention_fusion", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def read_until(stream: IO[str] | None, text: str) -> str:
    assert stream is not None
    lines: list[str] = []
    while not lines or text not in lines[-1]:
        line = stream.readline()
        assert line, "".join(lines)
        lines.append(line)
    return "".join(lines)


def cached_steps(output: str) -> dict[str, bool]:
    """Step -> whether it was there already."""
    return {step: time == "cached" for step, time in re.findall(r"^ *\d+/9 (\w+) +(cached|[\d.]+ s)", output, re.M)}


def test_what_two_runs_share_is_computed_by_one_of_them_while_the_other_waits(
    pico_parent_dir: Path, tmp_path: Path
) -> None:
    common = [*pico_overrides(pico_parent_dir, tmp_path), "prune_attention.num_attentions=3"]
    points = [[*common, "optim.lr=1e-3"], [*common, "optim.lr=1e-2"]]
    pipeline = compose_pipeline("attention_fusion", points[0])
    first = plan(pipeline, points[0])[0]
    _, _, store = run_places("attention_fusion", pipeline, points[0])
    locks = store.root / ".locks"
    locks.mkdir(parents=True)
    # Both meet at the first artifact, whoever starts faster.
    with filelock.FileLock(locks / f"{store.path(first.recipe).name}.lock"):
        runs = [start(point) for point in points]
        waiting = [read_until(run.stdout, "another process is computing import_parent-") for run in runs]
    outputs = [before + run.communicate(timeout=300)[0] for before, run in zip(waiting, runs, strict=True)]

    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert all("waiting for it" in output for output in outputs)
    cached = [cached_steps(output) for output in outputs]
    assert [list(steps) for steps in cached] == [[*SHARED, *OWN]] * 2
    assert all(sorted(steps[name] for steps in cached) == [False, True] for name in SHARED), "one computes, one takes"
    assert all(not steps[name] for steps in cached for name in OWN)
    made = sorted(path.name.partition("-")[0] for path in store.root.iterdir() if not path.name.startswith("."))
    once = ["import_parent", "prepare_data", "prune_attention", "measure_dependency", "fuse"]
    assert made == sorted([*once, *["distill", "evaluate", "benchmark", "export"] * 2])
    assert list((store.root / ".unfinished").iterdir()) == []
