"""However many processes share the work, the teacher's signals come out the same, file by file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from launch.__main__ import main
from tests.distributed.conftest import RunInProcesses
from tests.launch.training_inputs import write_data, write_teacher

SETTINGS = (
    "teacher_cache.seq_len=16 teacher_cache.max_tokens=640 teacher_cache.top_k=8 teacher_cache.eval_sequences=4 "
    "teacher_cache.shard_tokens=256 teacher_cache.batch_size=3 engine.device=cpu"
)
"""Files of 6, 6, 3 and 2 batches."""


def launch(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        return main(arguments), err.getvalue()


def signals(run: RunInProcesses, root: Path, inputs: list[str], processes: int, *further: str) -> dict[str, bytes]:
    arguments = ["cache_teacher", f"run.root={root}", *SETTINGS.split(), *inputs, *further]
    outcomes = run(processes, launch, arguments)
    assert [status for status, _ in outcomes] == [0] * processes, outcomes
    (directory,) = (root / "store").glob("cache_teacher-*")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "artifact.json"}


def test_two_processes_write_what_one_writes(
    pico_parent_dir: Path, tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    teacher, data = write_teacher(tmp_path / "teacher", pico_parent_dir), write_data(tmp_path / "data", pico_parent_dir)
    inputs = [f"inputs.teacher={teacher.path}", f"inputs.data={data.path}"]
    alone = signals(run_in_processes, tmp_path / "one", inputs, 1)
    shared = signals(run_in_processes, tmp_path / "two", inputs, 2)
    assert len(alone) == 3 + 1 + 1  # files of both splits, and the index
    assert shared == alone
    # Gathered weights are the same numbers.
    assert signals(run_in_processes, tmp_path / "dealt", inputs, 2, "engine.shard=true") == alone


def test_settings_that_are_refused_end_both_processes(
    pico_parent_dir: Path, tmp_path: Path, run_in_processes: RunInProcesses
) -> None:
    teacher, data = write_teacher(tmp_path / "teacher", pico_parent_dir), write_data(tmp_path / "data", pico_parent_dir)
    arguments = ["cache_teacher", f"run.root={tmp_path}", *SETTINGS.split(), "teacher_cache.top_k=400"]
    outcomes = run_in_processes(2, launch, [*arguments, f"inputs.teacher={teacher.path}", f"inputs.data={data.path}"])
    assert all(status != 0 for status, _ in outcomes)
    assert any("top_k=400 leaves no other of the 320 tokens" in said for _, said in outcomes)
