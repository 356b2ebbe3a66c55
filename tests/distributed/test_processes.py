"""One command in several processes: who works, who talks, and what is left when one of them fails."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as torch_distributed

from distill import distributed
from distill.config import EngineConfig
from launch import processes
from launch.__main__ import main
from launch.registry import STAGES, Stage
from launch.stage import Inputs, StageContext, StageResult
from tests.distributed.conftest import RunInProcesses


@dataclass(frozen=True, kw_only=True)
class SeedAndEngine:
    """The seed says which rank is to fail, and how."""

    seed: int
    engine: EngineConfig


def body(config: SeedAndEngine, inputs: Inputs, context: StageContext) -> StageResult:
    rank = distributed.rank()
    (context.out / f"rank{rank}.txt").write_text(f"{rank} of {distributed.world_size()}")
    if config.seed == rank:
        raise ValueError(f"rank {rank} does not like its work")
    if config.seed == 10 + rank:
        raise OSError(28, "No space left on device")
    if config.seed == 20 + rank:
        os._exit(9)
    if config.seed == 30 + rank:
        assert distributed.world_size() == 2
        _wait_for_a_message_that_never_comes()
    if config.seed == 30 + 1 - rank:
        torch_distributed.distributed_c10d._get_default_store().wait(["over"])
    places = distributed.gather_objects((str(context.out), str(context.resume), str(context.pool)))
    assert len(set(places)) == 1
    assert all((context.out / f"rank{other}.txt").is_file() for other in range(len(places)))
    return StageResult(headline=f"{len(places)} processes")


def _wait_for_a_message_that_never_comes() -> None:
    try:
        with distributed.limited(timedelta(seconds=1)):
            distributed.all_reduce_sum(torch.zeros(1))
    finally:
        torch_distributed.distributed_c10d._get_default_store().set("over", "")


def body_alone(config: SeedAndEngine, inputs: Inputs, context: StageContext) -> StageResult:
    assert config.seed != distributed.rank(), "not meant to fail here"
    (context.out / "world_size.txt").write_text(str(distributed.world_size()))
    return StageResult(headline="alone")


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``python -m launch``, with stages of the test's own."""
    row: dict[str, Any] = {"config": SeedAndEngine, "inputs": {}, "output": "report"}
    STAGES["all"] = Stage(body=f"{__name__}:body", distributed=True, **row)
    STAGES["one"] = Stage(body=f"{__name__}:body_alone", **row)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def arguments(root: Path, stage: str, *overrides: str) -> list[str]:
    return [stage, f"run.root={root}", "seed=7", *overrides]


def committed(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("store/*/artifact.json"))


def test_a_stage_for_all_runs_in_all_and_the_first_talks(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    first, second, third = run_in_processes(3, run_main, arguments(tmp_path, "all"))
    assert first[0] == 0, first
    assert "3 processes" in first[1]
    assert second == third == (0, "", "")
    (artifact,) = committed(tmp_path)
    assert (artifact / "rank2.txt").read_text() == "2 of 3"
    # The number of processes is placement: one process finds the artifact of three.
    (again,) = run_in_processes(1, run_main, arguments(tmp_path, "all"))
    assert "cached" in again[1]


def test_a_stage_for_one_runs_alone(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    first, second = run_in_processes(2, run_main, arguments(tmp_path, "one"))
    assert (first[0], second) == (0, (0, "", ""))
    (artifact,) = committed(tmp_path)
    assert (artifact / "world_size.txt").read_text() == "1"


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_ends_all_with_one_message(tmp_path: Path, run_in_processes: RunInProcesses, failing: int) -> None:
    results = run_in_processes(2, run_main, [*arguments(tmp_path, "all")[:2], f"seed={failing}"])
    assert [status for status, _, _ in results] == [2, 2]
    said = [err for _, _, err in results]
    assert said[failing].strip() == f"error: process {failing} of 2: rank {failing} does not like its work"
    assert said[1 - failing] == ""
    assert committed(tmp_path) == []
    (again,) = run_in_processes(1, run_main, arguments(tmp_path, "all"))
    assert again[0] == 0


def test_full_disk_in_the_first_process_ends_all(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    first, second = run_in_processes(2, run_main, [*arguments(tmp_path, "all")[:2], "seed=10"])
    assert "the disk under" in first[2]
    assert (first[0], second) == (2, (2, "", ""))


def test_a_process_that_is_killed_is_missed(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    first, second = run_in_processes(2, run_main, [*arguments(tmp_path, "all")[:2], "seed=21"])
    assert second is None
    assert first[0] == 2
    assert "process 0 of 2 has lost another one, which ended without a word" in first[2]
    assert committed(tmp_path) == []


def test_a_process_that_hangs_is_given_up(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    first, second = run_in_processes(2, run_main, [*arguments(tmp_path, "all")[:2], "seed=30"])
    assert "process 0 of 2 has waited too long for another one, which hangs" in first[2]
    assert "goes on from the last resume point" in first[2]
    assert (first[0], second[0], second[2]) == (2, 2, "")
    assert committed(tmp_path) == []


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["engine.slices=3"], "engine.slices=3 needs a multiple of 3 processes, got 2"),
        (["engine.slics=3"], "did you mean 'engine.slices'"),
        (["--multirun", "hydra/launcher=joblib"], "hydra/launcher starts processes"),
    ],
)
def test_what_the_first_process_refuses_ends_all(
    tmp_path: Path, run_in_processes: RunInProcesses, further: list[str], message: str
) -> None:
    first, second = run_in_processes(2, run_main, arguments(tmp_path, "all", *further))
    assert message in first[2]
    assert (first[0], second) == (2, (2, "", ""))
    assert committed(tmp_path) == []


def test_a_sweep_ends_when_the_processes_are_torn_apart(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    sweep = [*arguments(tmp_path, "all")[:2], "--multirun", "seed=7,1,8"]
    first, second = run_in_processes(2, run_main, sweep)
    assert (first[0], second[0]) == (2, 2)
    assert "process 1 of 2: rank 1 does not like its work" in second[2]
    assert len(committed(tmp_path)) == 1


def test_dry_run_meets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "run", lambda command: pytest.fail("joined"))
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["demo", f"run.root={tmp_path}", "--dry-run"]) == 0
        assert bool(capsys.readouterr().out) == said


def test_one_process_refuses_slices_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", f"run.root={tmp_path}", "engine.slices=2"]) == 2
    assert "step library: engine.slices=2 needs a multiple of 2 processes, got 1" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
