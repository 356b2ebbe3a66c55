from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill.config import TrackingConfig
from distill.tracking import SENT_FILE, Tracker


class FakeRun:
    def __init__(self, step: int) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.step = step

    @property
    def rows(self) -> list[tuple[int, dict[str, float]]]:
        return [argument for name, argument in self.calls if name == "log"]

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, row: dict[str, float], *, step: int) -> None:
        self.calls.append(("log", (step, row)))

    def finish(self, *, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("wandb")
    module.runs, module.settings = [], []  # type: ignore[attr-defined]
    module.next_step = 0  # type: ignore[attr-defined]

    def init(**settings: Any) -> FakeRun:
        module.runs.append(FakeRun(module.next_step))  # type: ignore[attr-defined]
        module.settings.append(settings)  # type: ignore[attr-defined]
        return module.runs[-1]  # type: ignore[attr-defined]

    module.init = init  # type: ignore[attr-defined]
    module.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _tracker(path: Path, *, wandb: str = "off", step_name: str = "distill_child") -> Tracker:
    return Tracker(
        path / "metrics.jsonl",
        TrackingConfig(wandb=wandb, project="pico", entity="us"),  # type: ignore[arg-type]
        run_name="demo",
        step_name=step_name,
        stage="distill",
        settings={"seed": 3},
        resume_dir=path,
    )


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_reach_the_file_at_once(tmp_path: Path) -> None:
    with _tracker(tmp_path) as tracker:
        tracker.log({"tokens": 0, "eval/kld": 0.5})
        assert _rows(tmp_path) == [{"tokens": 0, "eval/kld": 0.5}]
        tracker.log({"tokens": 8, "train/kld": 0.25})
    assert _rows(tmp_path)[1] == {"tokens": 8, "train/kld": 0.25}


def test_a_resumed_file_holds_the_rows_of_the_resume_point_alone(tmp_path: Path) -> None:
    with _tracker(tmp_path) as tracker:
        for tokens in (0, 8, 16):
            tracker.log({"tokens": tokens})
    with _tracker(tmp_path) as tracker:
        tracker.restore([{"tokens": 0}, {"tokens": 8}])
        tracker.log({"tokens": 16, "train/kld": 0.1})
    assert _rows(tmp_path) == [{"tokens": 0}, {"tokens": 8}, {"tokens": 16, "train/kld": 0.1}]


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with _tracker(tmp_path) as tracker:
        tracker.log({"tokens": 1})
    assert _rows(tmp_path) == [{"tokens": 1}]


def test_a_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[wandb\]'"):
        _tracker(tmp_path, wandb="offline")


def test_a_wandb_that_does_not_start_is_one_line(tmp_path: Path, wandb: ModuleType) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("no API key configured\nsee the docs")

    wandb.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^W&B does not start \(no API key configured\); run .*$"):
        _tracker(tmp_path, wandb="online")


def test_wandb_gets_the_run_and_every_new_row(tmp_path: Path, wandb: ModuleType) -> None:
    with _tracker(tmp_path, wandb="offline") as tracker:
        tracker.restore([{"tokens": 0}])
        tracker.log({"tokens": 8})
    (settings,) = wandb.settings
    expected = {
        "project": "pico",
        "entity": "us",
        "mode": "offline",
        "group": "demo",
        "job_type": "distill",
        "name": "demo/distill_child",
        "resume": "allow",
        "config": {"seed": 3},
    }
    assert expected.items() <= settings.items()
    assert wandb.runs[0].calls == [("define_metric", ("*", "tokens")), ("log", (1, {"tokens": 8})), ("finish", 0)]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_no_row_twice_after_a_kill(tmp_path: Path, wandb: ModuleType, mode: str) -> None:
    """The resume point is older than the last rows. Online the server knows them, offline our own file does."""
    killed = _tracker(tmp_path, wandb=mode)
    for tokens in (0, 8, 16, 24):
        killed.log({"tokens": tokens})
    if mode == "online":
        (tmp_path / SENT_FILE).unlink()  # on another machine, for example
        wandb.next_step = 4  # type: ignore[attr-defined]
    with _tracker(tmp_path, wandb=mode) as tracker:
        tracker.restore([{"tokens": 0}, {"tokens": 8}])
        for tokens in (16, 24, 32):
            tracker.log({"tokens": tokens})
    first, second = wandb.runs
    assert first.rows == [(0, {"tokens": 0}), (1, {"tokens": 8}), (2, {"tokens": 16}), (3, {"tokens": 24})]
    assert second.rows == [(4, {"tokens": 32})]
    assert _rows(tmp_path) == [{"tokens": tokens} for tokens in (0, 8, 16, 24, 32)]


def test_restored_rows_that_wandb_never_had_do_not_count_as_sent(tmp_path: Path, wandb: ModuleType) -> None:
    """What another run has trained is restored at the start of the first attempt already."""
    for last in (24, 32):
        with _tracker(tmp_path, wandb="offline") as tracker:
            tracker.restore([{"tokens": 0}, {"tokens": 8}])
            for tokens in range(16, last + 1, 8):
                tracker.log({"tokens": tokens})
    assert [row["tokens"] for run in wandb.runs for _, row in run.rows] == [16, 24, 32]


def test_wandb_run_ids_are_stable_and_distinct(tmp_path: Path, wandb: ModuleType) -> None:
    for step_name in ("a", "a", "b"):
        _tracker(tmp_path, wandb="online", step_name=step_name).close()
    first, again, other = (settings["id"] for settings in wandb.settings)
    assert first == again != other


def test_a_failed_stage_is_a_failed_wandb_run(tmp_path: Path, wandb: ModuleType) -> None:
    def fail() -> None:
        with _tracker(tmp_path, wandb="offline"):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert wandb.runs[0].calls[-1] == ("finish", 1)


def _records(file: Path) -> Iterator[bytes]:
    """Records of an offline run: LevelDB's log format behind a header of 7 bytes."""
    data = file.read_bytes()
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32_768 - position % 32_768 < 7:
            position += 32_768 - position % 32_768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last part
            yield record
            record = b""


@pytest.mark.slow
def test_the_real_wandb_writes_offline_runs_that_follow_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = []
    for first, last in ((0, 3), (2, 5)):
        with _tracker(tmp_path, wandb="offline") as tracker:
            tracker.restore([{"tokens": 8 * number} for number in range(first)])
            for number in range(first, last):
                tracker.log({"tokens": 8 * number, "eval/kld": 0.5})
        # Runs that start within one second would share their directory.
        (directory,) = tmp_path.glob("wandb/offline-run-*")
        (file,) = directory.rename(tmp_path / f"attempt_{first}").glob("run-*.wandb")
        for data in _records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                rows.append((int(values["_step"]), int(values["tokens"])))
    assert rows == [(number, 8 * number) for number in range(5)]
