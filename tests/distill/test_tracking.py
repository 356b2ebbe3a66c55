from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill import wandb_run
from distill.config import TrackingConfig
from distill.recovered import Recovery
from distill.tracking import Tracker
from distill.wandb_run import RunIdentity
from tests.wandb_files import read_runs


class FakeRun:
    url = "https://wandb.test/run"
    offline = False
    dir = "/nowhere/wandb/run-1/files"

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


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not met W&B yet."""
    monkeypatch.setattr(wandb_run, "_process", wandb_run._Process())
    monkeypatch.delenv("WANDB_MODE", raising=False)


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
    monkeypatch.setattr(wandb_run, "_num_logged", lambda directory, run_id: 0)
    module.Settings = dict  # type: ignore[attr-defined]
    module.teardown = lambda: None  # type: ignore[attr-defined]
    module.login = lambda **_: False  # type: ignore[attr-defined]
    module.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _tracker(path: Path, *, wandb: str = "off", step_name: str = "distill_child", **settings: Any) -> Tracker:
    return Tracker(
        path / "metrics.jsonl",
        TrackingConfig(wandb=wandb, project="pico", entity="us"),  # type: ignore[arg-type]
        run_name="demo",
        step_name=step_name,
        stage="distill",
        settings={"seed": 3},
        resume_dir=path,
        **settings,
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
    rows = [("log", (0, {"tokens": 0})), ("log", (1, {"tokens": 8}))]
    assert wandb.runs[0].calls == [("define_metric", ("*", "tokens")), *rows, ("finish", 0)]


def test_wandb_gets_no_row_twice_after_a_kill(tmp_path: Path, wandb: ModuleType) -> None:
    """The resume point is older than the last rows, which the server has."""
    killed = _tracker(tmp_path, wandb="online")
    for tokens in (0, 8, 16, 24):
        killed.log({"tokens": tokens})
    wandb_run._process.current = None  # as in a new process
    wandb.next_step = 4  # type: ignore[attr-defined]
    with _tracker(tmp_path, wandb="online") as tracker:
        tracker.restore([{"tokens": 0}, {"tokens": 8}])
        for tokens in (16, 24, 32):
            tracker.log({"tokens": tokens})
    first, second = wandb.runs
    assert first.rows == [(0, {"tokens": 0}), (1, {"tokens": 8}), (2, {"tokens": 16}), (3, {"tokens": 24})]
    assert second.rows == [(4, {"tokens": 32})]
    assert _rows(tmp_path) == [{"tokens": tokens} for tokens in (0, 8, 16, 24, 32)]


def test_wandb_gets_the_restored_rows_that_it_never_had(tmp_path: Path, wandb: ModuleType) -> None:
    """What another run has trained is restored at the start of the first attempt already."""
    for last in (24, 32):
        wandb.next_step = wandb.runs[0].rows[-1][0] + 1 if wandb.runs else 0  # type: ignore[attr-defined]
        with _tracker(tmp_path, wandb="offline") as tracker:
            tracker.restore([{"tokens": 0}, {"tokens": 8}])
            for tokens in range(16, last + 1, 8):
                tracker.log({"tokens": tokens})
    assert [row["tokens"] for run in wandb.runs for _, row in run.rows] == [0, 8, 16, 24, 32]


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


def test_wandb_mode_takes_a_run_offline_or_away_and_never_online(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for environment in ("online", "offline", "disabled", "dryrun"):
        monkeypatch.setenv("WANDB_MODE", environment)
        for asked in ("off", "offline", "online"):
            found[environment, asked] = wandb_run.mode(TrackingConfig(wandb=asked))  # type: ignore[arg-type]
    assert {key: mode for key, mode in found.items() if key[1] == "off"} == {(e, "off"): "off" for e, _ in found}
    assert {e: found[e, "offline"] for e in ("online", "offline", "dryrun")} == dict.fromkeys(
        ("online", "offline", "dryrun"), "offline"
    )
    assert [found[e, "online"] for e in ("online", "offline", "dryrun")] == ["online", "offline", "offline"]
    assert found["disabled", "online"] == found["disabled", "offline"] == "off"


def test_online_without_a_login_is_refused_and_offline_is_not(wandb: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"needs a W&B login.*`wandb login`.*tracking\.wandb=offline"):
        wandb_run.check(TrackingConfig(wandb="online"))
    wandb_run.check(TrackingConfig(wandb="offline"))
    wandb_run.check(TrackingConfig())


def test_a_network_that_is_down_at_the_start_leaves_the_run_offline(tmp_path: Path, wandb: ModuleType) -> None:
    start = wandb.init

    def unreachable(*, mode: str, **settings: Any) -> FakeRun:
        if mode == "online":
            raise wandb.Error("Timed out while retrying: dial tcp 127.0.0.1:9: connection refused")
        return start(mode=mode, **settings)

    wandb.init = unreachable  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match="does not answer .* kept offline"), _tracker(tmp_path, wandb="online") as t:
        t.log({"tokens": 8})
    assert wandb.runs[0].rows == [(0, {"tokens": 8})]
    # The next step does not wait for the network again.
    _tracker(tmp_path, wandb="online", step_name="b").close()
    assert [settings["mode"] for settings in wandb.settings] == ["offline", "offline"]


def test_a_wandb_that_fails_meanwhile_does_not_stop_the_training(
    tmp_path: Path, wandb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeRun, row: Any, *, step: int) -> None:
        raise ConnectionResetError("Connection lost")

    tracker = _tracker(tmp_path, wandb="online")
    monkeypatch.setattr(FakeRun, "log", fail)
    with pytest.warns(RuntimeWarning, match=r"W&B is lost \(Connection lost\)"):
        tracker.log({"tokens": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log({"tokens": 8})
        tracker.close()
    assert _rows(tmp_path) == [{"tokens": 0}, {"tokens": 8}]
    _tracker(tmp_path, wandb="online", step_name="b").close()
    assert len(wandb.runs) == 1


def test_a_tracker_goes_on_in_the_run_that_its_step_has_started(tmp_path: Path, wandb: ModuleType) -> None:
    identity = RunIdentity(run_name="demo", step_name="distill_child", stage="distill", place=tmp_path.name)
    run = wandb_run.start(TrackingConfig(wandb="offline"), identity, settings={}, state_dir=tmp_path / "state")
    assert run is not None
    with _tracker(tmp_path, wandb="offline") as tracker:
        tracker.log({"tokens": 8})
    assert wandb.runs[0].calls[1:] == [("log", (0, {"tokens": 8}))]
    run.finish()
    assert wandb.runs[0].calls[-1] == ("finish", 0)
    assert len(wandb.runs) == 1


def test_evaluations_say_what_is_retained_and_recovered(tmp_path: Path) -> None:
    held_out = [{"tokens": t, "eval/lm_loss": s, "eval/teacher_lm_loss": 2.0} for t, s in ((0, 3.0), (8, 2.25))]
    with _tracker(tmp_path, further=Recovery(starts_untrained=True)) as tracker:
        tracker.restore([held_out[0], {"tokens": 4, "train/loss": 1.0}])
        tracker.log(held_out[1])
    first, training, second = _rows(tmp_path)
    assert training == {"tokens": 4, "train/loss": 1.0}
    assert (first["eval/lm_loss_gap"], second["eval/lm_loss_gap"]) == (1.0, 0.25)
    assert second["eval/retained_frac"] == pytest.approx(math.exp(2.0) / math.exp(2.25))
    assert (first["eval/gap_closed_frac"], second["eval/gap_closed_frac"]) == (0.0, 0.75)


def test_nothing_is_closed_where_the_student_was_trained_before_or_started_no_worse() -> None:
    for starts_untrained in (False, True):
        found = Recovery(starts_untrained=starts_untrained)({"eval/lm_loss": 1.75, "eval/teacher_lm_loss": 2.0})
        assert found.keys() == {"eval/lm_loss_gap", "eval/retained_frac"}
    # A teacher beyond any measure is no reason to stop.
    assert Recovery(starts_untrained=True)({"eval/lm_loss": 1.0, "eval/teacher_lm_loss": 1e6})["eval/retained_frac"] > 1


def test_the_real_wandb_writes_offline_runs_that_follow_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # W&B reads its variables once: what an earlier test has started would not know this one's directory.
    wandb.teardown()
    for first, last in ((0, 3), (2, 5)):
        with _tracker(tmp_path, wandb="offline") as tracker:
            tracker.restore([{"tokens": 8 * number} for number in range(first)])
            for number in range(first, last):
                tracker.log({"tokens": 8 * number, "eval/kld": 0.5})
        # Runs that start within one second would share their directory.
        (directory,) = tmp_path.glob("wandb/offline-run-*")
        directory.rename(tmp_path / "wandb" / f"done-{first}")
    for done in tmp_path.glob("wandb/done-*"):
        done.rename(tmp_path / "wandb" / f"offline-run-{done.name}")
    first_run, second_run = read_runs(tmp_path)
    assert first_run.id == second_run.id
    assert first_run.may_resume
    assert first_run.step_metrics == {"*": "tokens"}
    rows = [(row["_step"], row["tokens"]) for run in (first_run, second_run) for row in run.history]
    assert rows == [(number, 8 * number) for number in range(5)]


ATTEMPT = """
import os, signal, subprocess, sys
from pathlib import Path
from distill.config import TrackingConfig
from distill.recovered import Recovery
from distill.tracking import Tracker

path, num_restored, num_rows, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
names = {"run_name": "demo", "step_name": "a", "stage": "distill", "settings": {}, "resume_dir": path}
with Tracker(path / "metrics.jsonl", TrackingConfig(wandb="offline"), **names) as tracker:
    tracker.restore({"tokens": 8 * number} for number in range(num_restored))
    for number in range(num_restored, num_rows):
        tracker.log({"tokens": 8 * number})
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "service killed":
        command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())]
        children = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        (service,) = [int(line.split()[0]) for line in children if "wandb-core" in line]
        os.kill(service, signal.SIGKILL)
        for number in range(num_rows, 2000):
            tracker.log({"tokens": 8 * number})
"""


def _attempt(root: Path, num_restored: int, num_rows: int, end: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("wandb")
    # Without the address of a service that another test has started.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    arguments = [str(root), str(num_restored), str(num_rows), end]
    return subprocess.run(
        [sys.executable, "-c", ATTEMPT, *arguments],
        capture_output=True,
        text=True,
        env={**inherited, "WANDB_DIR": str(root)},
        check=False,
        timeout=120,
    )


def test_training_outlives_the_real_service_process(tmp_path: Path) -> None:
    done = _attempt(tmp_path, 0, 1, "service killed")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is lost") == 1
    assert len(_rows(tmp_path)) == 2000


@pytest.mark.parametrize(("num_restored", "num_logged"), [(2, 4), (300, 400)])
def test_killed_processes_and_the_next_give_the_real_wandb_every_row_once(
    tmp_path: Path, num_restored: int, num_logged: int
) -> None:
    """Of a killed process W&B has whole blocks of its log alone: nothing in the first case, most rows in the second."""
    killed = _attempt(tmp_path, 0, num_logged, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = _attempt(tmp_path, num_restored, num_logged + 2, "finished")
    assert done.returncode == 0, done.stderr
    *torn, whole = sorted(read_runs(tmp_path), key=lambda run: run.exit_code is not None)
    assert len(torn) == 1
    assert len(torn[0].history) < num_logged
    assert bool(torn[0].history) == (num_logged > 100)
    sent = [(row["_step"], row["tokens"]) for run in (*torn, whole) for row in run.history]
    assert sent == [(number, 8 * number) for number in range(num_logged + 2)]
    assert len(_rows(tmp_path)) == num_logged + 2
