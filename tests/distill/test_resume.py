from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint

from distill import resume
from tests.killing import kill_at_call

TENSORS = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3)},
    "rng": {"cpu": torch.arange(8, dtype=torch.uint8)},
}


def _save(directory: Path, *steps: int) -> None:
    for step in steps:
        tensors = {**TENSORS, "optimizer": {"weight/step": torch.tensor(float(step))}}
        resume.save(directory, step, tensors=tensors, state={"step": step, "curve": [{"tokens": 8 * step}]})


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_point_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    _save(tmp_path / "run", 3)
    point = resume.latest(tmp_path / "run")
    assert point is not None
    assert point.step == 3
    assert point.state == {"step": 3, "curve": [{"tokens": 24}]}
    tensors = point.tensors()
    assert tensors.keys() == {"model", "optimizer", "rng"}
    assert torch.equal(tensors["model"]["weight"], TENSORS["model"]["weight"])
    assert torch.equal(tensors["rng"]["cpu"], TENSORS["rng"]["cpu"])
    assert tensors["optimizer"]["weight/step"] == 3


def test_there_may_be_no_point(tmp_path: Path) -> None:
    assert resume.latest(tmp_path) is None
    assert resume.latest(tmp_path / "missing") is None


def test_the_newest_two_points_are_kept_by_number(tmp_path: Path) -> None:
    _save(tmp_path, 8, 9, 10)
    assert _names(tmp_path) == ["step_10", "step_9"]
    point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == 10


def _truncate(point: Path) -> None:
    file = point / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _alter(point: Path) -> None:
    file = point / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _remove_file(point: Path) -> None:
    (point / "optimizer.safetensors").unlink()


def _remove_marker(point: Path) -> None:
    (point / "commit.json").unlink()


def _break_marker(point: Path) -> None:
    (point / "commit.json").write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _alter, _remove_file, _remove_marker, _break_marker])
def test_damaged_points_are_passed_over_with_a_warning(tmp_path: Path, damage: object) -> None:
    _save(tmp_path, 1, 2)
    damage(tmp_path / "step_2")  # type: ignore[operator]
    with pytest.warns(RuntimeWarning, match="step_2 is damaged and not used"):
        point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == 1


def test_a_damaged_point_is_written_again_and_never_outlives_a_whole_one(tmp_path: Path) -> None:
    _save(tmp_path, 1, 4)
    _truncate(tmp_path / "step_4")
    _save(tmp_path, 3)
    assert _names(tmp_path) == ["step_1", "step_3"]
    _truncate(tmp_path / "step_3")
    _save(tmp_path, 3)
    point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == 3


def test_the_leftover_of_a_kill_is_ignored_and_cleared(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    leftover = tmp_path / "step_2.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == 1
    _save(tmp_path, 3)
    assert _names(tmp_path) == ["step_1", "step_3"]


def test_the_marker_covers_every_file(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    files = json.loads((tmp_path / "step_1" / "commit.json").read_text())["files"]
    assert {*files, "commit.json"} == set(_names(tmp_path / "step_1"))


def _save_until_killed(directory: str, owner: object, function: str, number: int) -> None:
    kill_at_call(owner, function, number)
    _save(Path(directory), 3)


@pytest.mark.parametrize(
    ("owner", "function", "number", "newest", "standing"),
    [
        pytest.param(resume, "save_file", 0, 2, ["step_1", "step_2", "step_3.tmp"], id="no file"),
        pytest.param(resume, "save_file", 2, 2, ["step_1", "step_2", "step_3.tmp"], id="some files"),
        pytest.param(resume, "sha256_of", 0, 2, ["step_1", "step_2", "step_3.tmp"], id="no checksum"),
        # Four files are flushed before the marker.
        pytest.param(resume, "flush_to_disk", 4, 2, ["step_1", "step_2", "step_3.tmp"], id="marker not flushed"),
        pytest.param(Path, "rename", 0, 2, ["step_1", "step_2", "step_3.tmp"], id="not in place"),
        pytest.param(resume, "flush_to_disk", 6, 3, ["step_1", "step_2", "step_3"], id="its name not flushed"),
        pytest.param(shutil, "rmtree", 0, 3, ["step_1", "step_2", "step_3"], id="the oldest still there"),
        pytest.param(os, "rmdir", 0, 3, ["step_1", "step_2", "step_3"], id="the oldest half removed"),
    ],
)
def test_a_kill_around_the_commit_leaves_whole_points(
    tmp_path: Path, owner: object, function: str, number: int, newest: int, standing: list[str]
) -> None:
    _save(tmp_path, 1, 2)
    arguments = (str(tmp_path), owner, function, number)
    process = multiprocessing.get_context("fork").Process(target=_save_until_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert _names(tmp_path) == standing
    point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == newest
    assert point.tensors()["optimizer"]["weight/step"] == newest
    _save(tmp_path, 4)
    assert _names(tmp_path) == [f"step_{newest}", "step_4"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 64 KiB: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
def test_a_failed_write_leaves_earlier_points_whole(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    large = {**TENSORS, "optimizer": {"exp_avg": torch.zeros(1 << 16)}}
    with pytest.raises(ValueError, match=r"^step_3 could not be written to .*.* go on from step_2$") as error:
        resume.save(tmp_path, 3, tensors=large, state={})
    assert "\n" not in str(error.value)
    assert _names(tmp_path) == ["step_1", "step_2"]
    point = resume.latest(tmp_path)
    assert point is not None
    assert point.step == 2


def test_what_is_written_together_is_a_point_like_any_other(tmp_path: Path) -> None:
    """One process is all of them."""

    def write(partial: Path) -> None:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_bytes(b"1234")

    for step in (1, 2, 3):
        resume.save_together(tmp_path, step, write=write, state={"step": step})
    assert _names(tmp_path) == ["step_2", "step_3"]
    point = resume.latest_together(tmp_path)
    assert point is not None
    assert (point.step, point.state) == (3, {"step": 3})
    (tmp_path / "step_3" / "deep" / "weights").write_bytes(b"1235")
    with pytest.warns(RuntimeWarning, match="step_3 is damaged and not used: deep/weights does not match its checksum"):
        point = resume.latest_together(tmp_path)
    assert point is not None
    assert point.step == 2


def _load_lacking(directory: Path) -> None:
    reader = checkpoint.FileSystemReader(directory / "tensors")
    checkpoint.load({"weight": torch.zeros(4), "lacking": torch.zeros(4)}, storage_reader=reader, no_dist=True)


def _load_absent(directory: Path) -> None:
    load_file(directory / "absent.safetensors")


@pytest.mark.parametrize(("load", "said"), [(_load_lacking, "Missing key"), (_load_absent, "No such file")])
def test_a_point_that_does_not_hold_what_is_asked_for_is_told_of_in_one_line(
    tmp_path: Path, load: Callable[[Path], None], said: str
) -> None:
    def write(partial: Path) -> None:
        writer = checkpoint.FileSystemWriter(partial / "tensors")
        checkpoint.save({"weight": torch.zeros(4)}, storage_writer=writer, no_dist=True)

    resume.save_together(tmp_path, 3, write=write, state={})
    point = resume.latest_together(tmp_path)
    assert point is not None
    with pytest.raises(ValueError, match=rf"^resume point .*step_3 could not be loaded: .*{said}.*remove it") as error:
        resume.load_together(point, load)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("small_files_only")
def test_an_engine_whose_state_does_not_fit_the_disk_is_told_of_in_one_line(tmp_path: Path) -> None:
    """torch.distributed.checkpoint wraps the error in one of its own."""

    def write(partial: Path) -> None:
        writer = checkpoint.FileSystemWriter(partial / "tensors")
        checkpoint.save({"weight": torch.zeros(1 << 16)}, storage_writer=writer, no_dist=True)

    with pytest.raises(ValueError, match=r"^step_3 could not be written to .*; make room .* from the start$") as error:
        resume.save_together(tmp_path, 3, write=write, state={})
    assert "\n" not in str(error.value)
    assert _names(tmp_path) == []
