"""Resume points that several processes write and read together."""

from __future__ import annotations

import json
from pathlib import Path

from distill import distributed, resume
from tests.distributed.conftest import RunInProcesses


def _save(directory: Path) -> None:
    distributed.join()

    def write(partial: Path) -> None:
        own = partial / "state" / f"{distributed.rank()}.bin"
        own.parent.mkdir(exist_ok=True)
        own.write_bytes(bytes([distributed.rank()]) * 100)

    with distributed.together():
        for step in (1, 2):
            resume.save_together(directory, step, write=write, state={"rank": distributed.rank()})


def _latest(directory: Path) -> tuple[int, int]:
    distributed.join()
    with distributed.together():
        point = resume.latest_together(directory)
    assert point is not None
    return point.step, point.state["rank"]


def test_one_marker_covers_what_every_process_wrote(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    run_in_processes(2, _save, tmp_path)
    files = json.loads((tmp_path / "step_2" / "commit.json").read_text())["files"]
    assert files.keys() == {"state.json", "state/0.bin", "state/1.bin"}
    assert run_in_processes(2, _latest, tmp_path) == [(2, 0), (2, 0)]


def _save_with_a_late_view(directory: Path) -> None:
    """The second process does not see in time what the first one has written, as over NFS."""
    distributed.join()

    def write(partial: Path) -> None:
        if distributed.is_main():
            for name in "abcde":
                (partial / name).write_text(name)

    with distributed.together():
        if not distributed.is_main():
            resume._files = lambda point: [point / "a"]
        resume.save_together(directory, 1, write=write, state={})


def test_the_first_process_lists_the_files(tmp_path: Path, run_in_processes: RunInProcesses) -> None:
    run_in_processes(2, _save_with_a_late_view, tmp_path)
    files = json.loads((tmp_path / "step_1" / "commit.json").read_text())["files"]
    assert list(files) == ["a", "b", "c", "d", "e", "state.json"]


def test_a_point_that_one_process_finds_damaged_is_used_by_none(
    tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    """Each process looks at every other file: one of them sees the damage."""
    run_in_processes(2, _save, tmp_path)
    (tmp_path / "step_2" / "state" / "1.bin").write_bytes(bytes(100))
    assert run_in_processes(2, _latest, tmp_path) == [(1, 0), (1, 0)]
