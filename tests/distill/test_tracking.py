from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill.config import TrackingConfig
from distill.tracking import Tracker


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, row: dict[str, float]) -> None:
        self.calls.append(("log", row))

    def finish(self, *, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("wandb")
    module.runs, module.settings = [], []  # type: ignore[attr-defined]

    def init(**settings: Any) -> FakeRun:
        module.runs.append(FakeRun())  # type: ignore[attr-defined]
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
    assert wandb.runs[0].calls == [("define_metric", ("*", "tokens")), ("log", {"tokens": 8}), ("finish", 0)]


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


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with _tracker(tmp_path, wandb="offline") as tracker:
        tracker.log({"tokens": 8, "eval/kld": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
