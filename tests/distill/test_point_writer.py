"""Resume points that are written beside training."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from distill import resume
from distill.point_writer import PointWriter


@dataclass
class Counter:
    """An engine whose state is a number, and which notes how many copies of it there are."""

    value: int = 0
    copies: list[int] = field(default_factory=list)
    write: Callable[[Path, int], None] = lambda directory, value: (directory / "value").write_text(str(value)) and None

    def save(self, directory: Path) -> None:
        self.write(directory, self.value)

    def snapshot(self) -> Callable[[Path], None]:
        value = self.value
        self.copies.append(value)

        def write(directory: Path) -> None:
            self.write(directory, value)
            self.copies.remove(value)

        return write


def _value(directory: Path, step: int) -> str:
    return (directory / f"step_{step}" / "value").read_text()


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    may_write = threading.Event()

    def write(directory: Path, value: int) -> None:
        assert may_write.wait(60)
        (directory / "value").write_text(str(value))

    engine, rows = Counter(write=write), [{"tokens": 1}]
    with PointWriter(tmp_path, keep=resume.last_two, background=True) as points:
        engine.value = 5
        points.save(5, engine, {"curve": list(rows)}, waits=False)
        engine.value = 6
        rows.append({"tokens": 2})
        points.check()
        assert not (tmp_path / "step_5").exists()
        may_write.set()
        assert points.last_committed() == tmp_path / "step_5"
    assert _value(tmp_path, 5) == "5"
    assert json.loads((tmp_path / "step_5" / "state.json").read_text()) == {"curve": [{"tokens": 1}]}


def test_a_point_waits_for_the_one_before_so_that_there_is_one_copy(tmp_path: Path) -> None:
    seen = []

    def write(directory: Path, value: int) -> None:
        seen.append(list(engine.copies))
        (directory / "value").write_text(str(value))

    engine = Counter(write=write)
    with PointWriter(tmp_path, keep=resume.last_two, background=True) as points:
        for step in range(1, 5):
            engine.value = step
            points.save(step, engine, {}, waits=False)
    assert seen == [[1], [2], [3], [4]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_a_point_that_is_waited_for_needs_no_copy(tmp_path: Path) -> None:
    engine = Counter(value=3)
    for background in (True, False):
        with PointWriter(tmp_path / str(background), keep=resume.last_two, background=background) as points:
            points.save(3, engine, {}, waits=background)
            assert _value(tmp_path / str(background), 3) == "3"
    assert engine.copies == []


def _full(directory: Path, value: int) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURE = (
    r"^step_2 could not be written to .*: .*No space left on device; make room and run again to go on from step_1$"
)


def _save_one_and_fail(directory: Path, look: str) -> None:
    """Two points, of which the second one fails; then ``look``."""
    engine = Counter()
    with PointWriter(directory, keep=resume.last_two, background=True) as points:
        points.save(1, engine, {}, waits=True)
        engine.write = _full
        points.save(2, engine, {}, waits=False)
        if look == "training fails":
            raise KeyError("training")
        if look == "check":
            assert points.last_committed() == directory / "step_1"
            points.check()
        elif look == "next point":
            points.save(3, engine, {}, waits=False)


@pytest.mark.parametrize("look", ["check", "next point", "end"])
def test_what_goes_wrong_in_the_thread_is_raised_by_the_one_that_trains(tmp_path: Path, look: str) -> None:
    with pytest.raises(ValueError, match=FAILURE) as error:
        _save_one_and_fail(tmp_path, look)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_where_training_fails_too_the_failed_point_is_a_warning(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="training"), pytest.warns(RuntimeWarning, match=r"step_2 could not be written"):
        _save_one_and_fail(tmp_path, "training fails")


def _save_and_fail(directory: Path, engine: Counter, may_write: threading.Event) -> None:
    with PointWriter(directory, keep=resume.last_two, background=True) as points:
        points.save(2, engine, {}, waits=False)
        may_write.set()
        raise KeyError("training")


def test_where_training_fails_the_point_on_its_way_is_finished(tmp_path: Path) -> None:
    may_write = threading.Event()

    def write(directory: Path, value: int) -> None:
        assert may_write.wait(60)
        (directory / "value").write_text(str(value))

    with pytest.raises(KeyError, match="training"):
        _save_and_fail(tmp_path, Counter(value=2, write=write), may_write)
    assert _value(tmp_path, 2) == "2"
    assert resume.latest(tmp_path) is not None


def test_before_the_first_point_the_last_one_is_that_of_the_start(tmp_path: Path) -> None:
    with PointWriter(tmp_path, keep=resume.last_two, background=True) as points:
        assert points.last_committed() is None
        points.found(tmp_path / "step_7")
        assert points.last_committed() == tmp_path / "step_7"
