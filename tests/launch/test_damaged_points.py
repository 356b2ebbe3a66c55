"""Runs that go on from resume points after a kill or damage, through the command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distill.data.batch import Batch
from distill.data.dataset import Batches
from launch import preemption
from launch.__main__ import main
from launch.artifact import Artifact
from tests.launch.training_inputs import write_data, write_student, write_teacher

SETTINGS = [
    "engine=torch",
    "engine.device=cpu",
    "distill.max_tokens=1280",
    "distill.seq_len=16",
    "distill.batch_size=4",
    "distill.eval_sequences=4",
    "distill.resume_every_tokens=256",
    "optim.lr=5e-4",
]
"""20 steps, a point every 4."""


@pytest.fixture(scope="module")
def inputs(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("inputs")
    artifacts = {
        "data": write_data(root / "data", pico_parent_dir),
        "teacher": write_teacher(root / "t", pico_parent_dir),
    }
    artifacts["student"] = write_student(root / "student", artifacts["teacher"].path)
    return [f"inputs.{name}={artifact.path}" for name, artifact in artifacts.items()]


@pytest.fixture(scope="module")
def weights(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run comes to."""
    root = tmp_path_factory.mktemp("uninterrupted")
    assert main(_command(inputs, root)) == 0
    return _weights(root)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _command(inputs: list[str], root: Path, *more: str) -> list[str]:
    return ["distill", *SETTINGS, *inputs, f"run.root={root}", "run.name=r", *more]


def _weights(root: Path) -> bytes:
    (path,) = (root / "store").glob("distill-*")
    Artifact.load(path).verify()
    return (path / "model.safetensors").read_bytes()


def _points(root: Path) -> Path:
    (path,) = (root / "store" / ".resume").glob("distill-*")
    return path


def _interrupt(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[], None]) -> None:
    batch = Batches.batch

    def interrupted(self: Batches, step: int, *ranks: int) -> Batch:
        if step == at:
            how()
        return batch(self, step, *ranks)

    monkeypatch.setattr(Batches, "batch", interrupted)


def _control_c() -> None:
    raise KeyboardInterrupt


def _truncate(point: Path) -> None:
    file = next((point / "tensors").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit(point: Path) -> None:
    file = next((point / "tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _remove_marker(point: Path) -> None:
    (point / "commit.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _remove_marker])
def test_a_damaged_point_is_passed_over_and_the_result_is_the_same(
    inputs: list[str],
    weights: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    with monkeypatch.context() as patch:
        _interrupt(patch, 14, _control_c)
        assert main(_command(inputs, tmp_path)) == 130
    points = _points(tmp_path)
    assert {"step_8", "step_12"} == {path.name for path in points.glob("step_*")}
    damage(points / "step_12")
    first: list[int] = []
    with monkeypatch.context() as patch:
        _interrupt(patch, 8, lambda: first.append(8))
        with pytest.warns(RuntimeWarning, match=r"step_12 is damaged and not used: "):
            assert main(_command(inputs, tmp_path)) == 0
    assert first == [8]
    assert _weights(tmp_path) == weights
    assert not points.exists()


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_that_is_asked_to_stop_has_its_state_on_disk_when_it_ends(
    inputs: list[str], weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    """SIGTERM during step 13, counted from 0, when the point after step 12 may still be on its way."""
    command = _command(inputs, tmp_path, f"distill.resume_points.background={background}")
    monkeypatch.setattr(preemption, "_is_asked", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    preemption.install()
    try:
        with monkeypatch.context() as patch:
            _interrupt(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert main(command) == preemption.EXIT_STATUS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        monkeypatch.setattr(preemption, "_is_asked", False)
    assert {"step_12", "step_13"} == {path.name for path in _points(tmp_path).glob("step_*")}
    assert main(command) == 0
    assert _weights(tmp_path) == weights


def test_what_is_kept_and_who_waits_is_no_other_recipe(
    inputs: list[str], weights: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["distill.resume_points={newest: 1, every: 2, background: false}"]
    assert main(_command(inputs, tmp_path, *more)) == 0
    capsys.readouterr()
    assert main(_command(inputs, tmp_path, "--dry-run")) == 0
    assert "committed" in capsys.readouterr().out
    assert _weights(tmp_path) == weights
    assert main(_command(inputs, tmp_path, "distill.resume_points.newest=0")) == 2
    error = capsys.readouterr().err
    assert "resume_points.newest must be >= 1, got 0" in error
    assert error.count("\n") == 1
