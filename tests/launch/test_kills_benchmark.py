"""The benchmark of kills: how it deals them, and what it reads off progress bars."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.config import compose_pipeline
from launch.pipeline import PlannedStep, plan
from launch.stage import StageContext, StageResult
from launch.store import Store
from tests.launch.test_store import job, silent

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kills")


@pytest.fixture
def killed_launch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("killed_launch")


@pytest.fixture(scope="module")
def steps() -> list[PlannedStep]:
    return plan(compose_pipeline("demo", []), [])


def test_every_step_is_killed_and_training_more_often(kills: ModuleType, steps: list[PlannedStep]) -> None:
    cases = kills.deal(steps, 50, seed=0)
    assert [case.number for case in cases] == list(range(50))
    counts = Counter(case.step for case in cases)
    assert counts.keys() == {step.name for step in steps}
    training = {"parent", "library", "distilled", "extended"}
    assert min(counts[name] for name in training) > max(counts[name] for name in counts.keys() - training)
    for name in counts:
        kinds = Counter(case.moment.kind for case in cases if case.step == name)
        assert kinds["commit"] >= 1
        assert (kinds["anywhere"] >= 1) == (name not in training)
        assert (kinds["training step"] >= 1) == (kinds["resume point"] >= 1) == (name in training)
    assert all(0 <= case.moment.fraction < 1 for case in cases)


def test_moments_are_dealt_over_the_time_of_a_step_and_follow_from_the_seed(
    kills: ModuleType, steps: list[PlannedStep]
) -> None:
    cases = kills.deal(steps, 50, seed=0)
    fractions = [case.moment.fraction for case in cases if (case.step, case.moment.kind) == ("parent", "training step")]
    assert [int(fraction * len(fractions)) for fraction in fractions] == list(range(len(fractions)))
    assert kills.deal(steps, 50, seed=0) == cases
    assert kills.deal(steps, 50, seed=1) != cases


class EndedLaunch:
    """A command that ends at once, well."""

    seconds = 1.5

    def __init__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return 0

    def bars(self) -> list[object]:
        return []


def test_a_kill_says_when_it_struck_and_how_often_it_was_tried(
    kills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, moments = kills.Bench(tmp_path, "demo", []), []

    def strikes_at_a_fifth(_: object, moment: Any, *__: object, **___: object) -> bool:
        moments.append(moment.fraction)
        return moment.fraction <= 0.2

    monkeypatch.setattr(kills, "Launch", EndedLaunch)
    monkeypatch.setattr(kills, "kill_at", strikes_at_a_fifth)
    monkeypatch.setattr(bench, "_copy_inputs", lambda root, _: root.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(bench, "_unequal", lambda *_: ["search/solution.json"])
    case = kills.Case(number=7, step="search", moment=kills.Moment(kind="anywhere", fraction=0.7))
    kill = bench.kill(case, step_s=1.0)
    assert moments == [0.7, 0.35, 0.175]
    assert (kill.dealt_fraction, kill.fraction, kill.tries) == (0.7, 0.175, 3)
    case = kills.Case(number=8, step="search", moment=kills.Moment(kind="commit", fraction=0.1))
    kill = bench.kill(case, step_s=1.0)
    assert (kill.dealt_fraction, kill.fraction, kill.tries) == (0.1, 0.1, 1)
    monkeypatch.setattr(kills, "kill_at", lambda *_, **__: False)
    with pytest.raises(SystemExit, match="step search ended before it could be killed"):
        bench.kill(case, step_s=1.0)


def test_the_table_has_tries_and_moments_and_findings_are_read_again(kills: ModuleType, tmp_path: Path) -> None:
    shared = {"finished": True, "damaged": [], "unequal": [], "leftovers": [], "left": [], "restarts": 1}
    shared |= {"killed_after_s": 2.0, "restart_s": 3.0}
    found = [
        kills.Kill(number=0, step="a", kind="anywhere", dealt_fraction=0.8, fraction=0.2, tries=3, **shared),
        kills.Kill(number=1, step="a", kind="commit", dealt_fraction=0.5, fraction=0.5, tries=1, **shared),
    ]
    results = sys.modules["kill_results"]
    findings = results.Findings(seconds={"a": 4.0, "b": 1.0}, kills=found)
    head, rule, *rows = results.table(["a", "b"], findings).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, rule, *rows[:3])]
    assert {len(row) for row in cells} == {10}
    assert cells[0][:5] == ["step", "s", "kills", "tries", "moments"]
    assert cells[2][:7] == ["a", "4.0", "2", "4", "0.20 to 0.50", "0", "1"]
    assert cells[3][:5] == ["b", "1.0", "0", "0", ""]
    assert cells[4][:5] == ["all", "5.0", "2", "4", "0.20 to 0.50"]
    (tmp_path / "kills.json").write_text(json.dumps(asdict(findings)))
    assert results.read_findings(tmp_path) == findings


def _bar(desc: str, count: str) -> str:
    return f"\r{desc}:  25%|██▌       | {count}/41.0k [00:01<00:05, 6.25ktok/s, loss=0.5]"


def _lines(killed_launch: ModuleType, text: str) -> list[object]:
    launch = object.__new__(killed_launch.Launch)
    launch._lines = [(float(index), part) for index, part in enumerate(text.split("\n"))]
    return launch.bars()


def test_what_was_done_and_what_is_done_again_is_read_off_the_bars(killed_launch: ModuleType) -> None:
    before = _lines(
        killed_launch,
        "\n".join(_bar("distilled", count) for count in ("0.00", "2.05k", "4.10k", "4.10k", "6.14k", "8.19k"))
        + "\nevaluate:  50%|█████     | 4/8 [00:00<00:00, 90.1seq/s]",
    )
    assert [(line.desc, line.count) for line in before][-1] == ("distilled", "8.19k")
    after = _lines(killed_launch, "\n".join(_bar("distilled", count) for count in ("4.10k", "4.10k", "6.14k", "8.19k")))
    new = killed_launch.first_new_step(after)
    assert (new.at_s, new.count) == (2.0, "6.14k")
    assert killed_launch.lost_steps(before, after) == 2
    assert killed_launch.lost_steps([], after) is None
    assert killed_launch.first_new_step(after[:2]) is None


def test_of_two_phases_the_one_that_was_killed_counts(killed_launch: ModuleType) -> None:
    first = [_bar("extended at 256", count) for count in ("0.00", "2.05k")]
    second = [_bar("extended at 512", count) for count in ("0.00", "2.05k", "4.10k")]
    before = _lines(killed_launch, "\n".join([*first, *second]))
    after = _lines(killed_launch, "\n".join(second))
    assert killed_launch.first_new_step(after).desc == "extended at 512"
    assert killed_launch.lost_steps(before, after) == 2


def test_metrics_are_compared_without_what_a_clock_measured(kills: ModuleType, tmp_path: Path) -> None:
    def training(loss: float, speed: float):
        def body(context: StageContext) -> StageResult:
            row = {"tokens": 8, "train/loss": loss, "perf/tokens_per_s": speed}
            (context.out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            (context.out / "model.safetensors").write_text("weights")
            return StageResult(headline="")

        return body

    contents = []
    for index, body in enumerate((training(0.5, 1.0), training(0.5, 2.0), training(0.6, 1.0))):
        artifact, _ = Store(tmp_path / str(index)).get_or_compute(job(body), on_wait=silent)
        contents.append(kills._content(artifact.path))
    assert contents[0] == contents[1] != contents[2]
    assert contents[0].keys() == {"metrics.jsonl", "model.safetensors"}
    assert kills._content(tmp_path / "nothing") == {}


def test_damage_and_leftovers_are_found(kills: ModuleType, tmp_path: Path) -> None:
    def body(context: StageContext) -> StageResult:
        (context.out / "weights").write_text("whole")
        return StageResult(headline="")

    artifact, _ = Store(tmp_path / "store").get_or_compute(job(body), on_wait=silent)
    assert kills._damaged(tmp_path) == []
    assert kills._leftovers(tmp_path) == []
    (artifact.path / "weights").write_text("Whole")
    (tmp_path / "store" / "torn").mkdir()
    (tmp_path / "store" / ".resume" / "left").mkdir()
    altered, torn = kills._damaged(tmp_path)
    assert "weights was altered" in altered
    assert "torn is not an artifact" in torn
    assert kills._leftovers(tmp_path) == ["store/.resume/left"]
