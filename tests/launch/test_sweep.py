"""Sweeps of a pico pipeline through the command line, and the page over their runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import preemption
from launch.__main__ import main
from launch.report_command import _place_of
from launch.rundir import RunDirectory
from launch.sweep import Sweep, is_sweep
from tests.launch.pico_sweep import pico_overrides

SWEPT = ["prune_attention.num_attentions=3,9", "optim.lr=1e-3,1e-2"]
"""The pico parent has four attentions: the last two points fail."""


def sweep_command(root: Path, parent: Path, *further: str) -> list[str]:
    return ["attention_fusion", "--multirun", *pico_overrides(parent, root), *further]


def sweep_directory(root: Path) -> Path:
    (path,) = [path for path in root.iterdir() if is_sweep(path)]
    return path


@pytest.fixture(scope="module")
def root(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    assert main(sweep_command(root, pico_parent_dir, *SWEPT)) == 2, "two points fail"
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    return json.loads((sweep_directory(root) / "report" / "runs.json").read_text())


def finished(root: Path) -> list[Path]:
    return [point.run for point in Sweep.read(sweep_directory(root)).points if (point.run / "steps.json").is_file()]


def test_failed_points_do_not_stop_the_others_and_are_named(runs: dict[str, Any]) -> None:
    (group,) = runs["groups"]
    assert [row["number"] for row in group["runs"]] == [1, 2]
    assert list(runs["unfinished"]) == [
        "3: prune_attention.num_attentions=9 optim.lr=0.001",
        "4: prune_attention.num_attentions=9 optim.lr=0.01",
    ]
    assert all("only 3 attentions can be removed" in reason for reason in runs["unfinished"].values())


def test_what_lies_upstream_of_the_difference_is_computed_once(root: Path) -> None:
    made = sorted(path.name.partition("-")[0] for path in (root / "store").iterdir() if not path.name.startswith("."))
    own = ["distill", "evaluate", "benchmark", "export"]
    shared = ["import_parent", "prepare_data", "prune_attention", "measure_dependency", "fuse"]
    assert made == sorted([*shared, *own, *own])


def test_swept_keys_are_the_columns(root: Path, runs: dict[str, Any]) -> None:
    assert runs["columns"] == ["prune_attention.num_attentions", "optim.lr"]
    rows = runs["groups"][0]["runs"]
    assert [(row["prune_attention.num_attentions"], row["optim.lr"]) for row in rows] == [("3", "0.001"), ("3", "0.01")]
    assert runs["differing_settings"] == {"optim.lr": ["0.001", "0.01"]}
    with (sweep_directory(root) / "report" / "runs.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [line["optim.lr"] for line in table] == ["0.001", "0.01"]
    assert float(table[1]["kld"]) == rows[1]["kld"]


def test_rows_say_what_the_reports_of_the_runs_say(root: Path, runs: dict[str, Any]) -> None:
    for row in runs["groups"][0]["runs"]:
        report = json.loads((root / row["run"] / "report" / "report.json").read_text())
        model = report["models"]["distilled"]
        assert row["model"] == "distilled"
        for name in ("num_params", "kv_bytes_per_token", "decode_latency_vs_parent", "lm_loss", "kld", "tokens"):
            assert row[name] == model[name]
        assert row["lm_loss_gap_closed_frac"] == model["lm_loss_gap_closed_frac"]
        assert row["seconds"] == pytest.approx(sum(step["seconds"] for step in report["steps"]), abs=1e-2)
        assert row["gpu_hours"] is None, "there is none"
    assert runs["groups"][0]["parent"]["kld"] == 0.0


def test_marked_are_the_points_that_no_other_beats(runs: dict[str, Any]) -> None:
    rows = runs["groups"][0]["runs"]
    points = [(row["decode_latency_vs_parent"], row["kld"]) for row in rows]
    for row, (latency, kld) in zip(rows, points, strict=True):
        beaten = [p for p in [*points, (1.0, 0.0)] if p[0] <= latency and p[1] <= kld and p != (latency, kld)]
        assert row["on_front_of_kld"] == (not beaten)


def test_page_needs_nothing_from_outside_and_leads_to_the_runs(root: Path) -> None:
    directory = sweep_directory(root) / "report"
    page = (directory / "index.html").read_text()
    assert not re.search(r"https?:|\bsrc=|@import|<script|<link|<iframe", page)
    links = set(re.findall(r'<a href="([^"]+)"', page))
    assert len(links) == 2
    assert all((directory / link).resolve().is_file() and not link.startswith("/") for link in links)
    figures = re.findall(r'<svg class="figure" role="img" aria-label="([^"]+)"', page)
    assert figures[0] == "Pareto front of runs from 1"
    assert len(figures) == len(set(figures)) == 4
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "pictures reach into each other"
    assert page.count('class="lanes"') == 2
    assert "1: num_attentions=3, lr=0.001" in page
    assert (directory / "pareto.svg").read_text().startswith("<svg")
    assert "var(--" not in (directory / "pareto.svg").read_text()


def test_the_same_sweep_has_the_same_name_and_computes_nothing(
    root: Path, pico_parent_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path.name for path in root.iterdir()}
    assert main(sweep_command(root, pico_parent_dir, *SWEPT)) == 2
    printed = capsys.readouterr()
    assert {path.name for path in root.iterdir()} == before
    # Nine steps of two runs, and the two that come before the step that fails in each of the others.
    assert printed.out.count("cached") == 2 * 9 + 2 * 2
    assert "run 4 of 4: prune_attention.num_attentions=9 optim.lr=0.01" in printed.out
    assert printed.err.count("only 3 attentions can be removed") == 2
    assert re.search(r"missing: 3: .*only 3 attentions", printed.out)


def test_page_over_named_runs_says_the_same(root: Path, runs: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    paths = [str(path) for path in finished(root)]
    assert main(["report", *paths]) == 0
    (directory,) = root.glob("comparison-*")
    named = json.loads((directory / "runs.json").read_text())
    assert named["columns"] == ["optim.lr"], "all that differs between those that finished"
    for row, of_sweep in zip(named["groups"][0]["runs"], runs["groups"][0]["runs"], strict=True):
        assert row.items() <= of_sweep.items()
    assert f"report: {directory / 'index.html'}" in capsys.readouterr().out
    assert main(["report", *reversed(paths)]) == 0
    assert len(list(root.glob("comparison-*"))) == 1, "the name is that of the set"


def test_runs_that_were_moved_have_their_page_where_it_was(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = finished(root)
    assert main(["report", *map(str, paths)]) == 0
    (page,) = root.glob("comparison-*")
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, symlinks=True)
    again = [str(moved / path.relative_to(root)) for path in paths]
    assert main(["report", *again]) == 0
    assert [path.name for path in moved.glob("comparison-*")] == [page.name]
    assert f"report: {moved / page.name / 'index.html'}" in capsys.readouterr().out
    assert main(["report", *again, "--out", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "index.html").is_file()
    assert len(list(moved.glob("comparison-*"))) == 1


def test_the_page_of_other_runs_lies_elsewhere(tmp_path: Path) -> None:
    def place(*names: str, root: Path = tmp_path) -> Path:
        return _place_of([RunDirectory(root=root / name.rpartition("/")[0], name=Path(name).name) for name in names])

    assert place("a", "b") == place("b", "a")
    assert place("a", "b") != place("a", "c")
    # Of the same names in other directories.
    assert place("x/a", "y/a") == tmp_path / place("x/a", "y/a").name
    assert place("x/a", "y/a").name != place("x/a", "z/a").name
    assert place("a", "b", root=tmp_path / "x").name == place("a", "b").name


def test_page_over_a_sweep_is_made_again(root: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    assert main(["report", str(sweep_directory(root)), "--out", str(tmp_path / "page")]) == 0
    assert json.loads((tmp_path / "page" / "runs.json").read_text()) == runs
    links = re.findall(r'<a href="([^"]+)"', (tmp_path / "page" / "index.html").read_text())
    assert all((tmp_path / "page" / link).resolve().is_file() for link in links)


def test_runs_that_have_not_finished_are_named_at_once(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", *(str(point.run) for point in Sweep.read(sweep_directory(root)).points)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: 2 of 4 runs cannot be compared: ")
    assert error.count("it has no steps.json") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report takes the directory of a run, got none"),
        (["a", "b", "--ou", "c"], "unknown option --ou"),
        (["a", "b", "--out"], "--out needs a directory"),
        (["a", "--out", "c"], "--out is for several runs"),
    ],
)
def test_report_says_how_it_is_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "python -m launch report <directory" in error


def test_runs_of_other_workloads_are_not_compared(
    root: Path, pico_parent_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [text for text in pico_overrides(pico_parent_dir, root) if "generated_tokens" not in text]
    longer = ["optim.lr=1e-3", "prune_attention.num_attentions=3", "workload.generated_tokens=16", "run.name=longer"]
    assert main(["attention_fusion", *overrides, *longer]) == 0
    capsys.readouterr()
    paths = [*map(str, finished(root)), str(root / "longer")]
    assert main(["report", *paths, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not measured alike (workload): compare within a table, not between them" in printed
    assert ("8 generated" in printed, "16 generated" in printed) == (True, True)
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [[row["number"] for row in group["runs"]] for group in runs["groups"]] == [[1, 2], [3]]
    assert runs["groups"][1]["workload"]["generated_tokens"] == 16
    page = " ".join((tmp_path / "index.html").read_text().split())
    assert "not measured alike: they differ in workload" in page
    assert "<h2>Runs 1, 2</h2>" in page
    assert "<h2>Runs 3</h2>" in page
    assert page.count('aria-label="KL to the teacher') == 1, "the same teacher: curves share a picture"


def test_joblib_runs_points_in_processes_of_its_own(
    root: Path, pico_parent_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    pytest.importorskip("joblib")
    shutil.copytree(root / "store", tmp_path / "store", symlinks=True)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    swept = ["prune_attention.num_attentions=3,9", "optim.lr=1e-3"]
    assert main(sweep_command(tmp_path, pico_parent_dir, *swept, *launcher)) == 2
    printed = capfd.readouterr()
    assert "1| run 1 of 2: prune_attention.num_attentions=3" in printed.out
    assert "error: prune_attention.num_attentions=9: step pruned:" in printed.err
    runs = json.loads((sweep_directory(tmp_path) / "report" / "runs.json").read_text())
    assert [row["number"] for row in runs["groups"][0]["runs"]] == [1]
    assert list(runs["unfinished"]) == ["2: prune_attention.num_attentions=9"]


def test_under_slurm_a_run_whose_steps_are_all_there_has_its_links_and_report_at_once(
    root: Path, pico_parent_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "site.yaml").write_text("gpu_request: null\n")
    monkeypatch.setenv("FUSION_SITE", str(tmp_path / "site.yaml"))
    settings = ["optim.lr=1e-3", "prune_attention.num_attentions=3", "cluster=slurm", "cluster.gpus_per_node=1"]
    assert main(["attention_fusion", *pico_overrides(pico_parent_dir, root), *settings, "run.name=again"]) == 0
    assert "all steps of again are committed; nothing to submit" in capsys.readouterr().out
    again = RunDirectory(root=root, name="again")
    assert again.read_steps().keys() == RunDirectory.at(finished(root)[0]).read_steps().keys()
    assert (again.path / "report" / "index.html").is_file()


def test_slurm_and_a_launcher_are_refused_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["demo", "--multirun", "seed=1,2", f"run.root={tmp_path}", "cluster=slurm", "cluster.gpus_per_node=1"]
    assert main([*command, "hydra/launcher=joblib"]) == 2
    assert "cluster=slurm submits every run as a chain of jobs, and hydra/launcher=joblib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_submitit_runs_points_as_jobs(root: Path, pico_parent_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    shutil.copytree(root / "store", tmp_path / "store", symlinks=True)
    swept = ["prune_attention.num_attentions=3,9", "optim.lr=1e-3"]
    assert main(sweep_command(tmp_path, pico_parent_dir, *swept, "hydra/launcher=submitit_local")) == 2
    runs = json.loads((sweep_directory(tmp_path) / "report" / "runs.json").read_text())
    assert [row["number"] for row in runs["groups"][0]["runs"]] == [1]
    assert list(runs["unfinished"]) == ["2: prune_attention.num_attentions=9"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joblib", "hydra/launcher=joblib is not installed; install it with `pip install hydra-joblib-launcher`"),
        ("submitit_slurm", "install it with `pip install hydra-submitit-launcher`"),
        ("joblibb", "unknown hydra/launcher=joblibb; known are basic, joblib, submitit_local, submitit_slurm"),
    ],
)
def test_a_launcher_that_is_not_installed_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("launch.sweep.launchers", lambda: ["basic"])
    assert main(["demo", "--multirun", "seed=1,2", f"hydra/launcher={name}", f"run.root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_point_is_refused_before_the_first_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--multirun", "seed=1,two", f"run.root={tmp_path}"]) == 2
    assert "seed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_every_point_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--multirun", "seed=1,2", f"run.root={tmp_path}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("to compute") == 2 * 14
    assert "run 2 of 2: seed=2" in printed
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_nobody_expected_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tried = []

    def run(target: str, overrides: list[str], *, dry_run: bool) -> None:
        tried.append(overrides[0])
        if overrides[0] == "seed=1":
            raise RuntimeError("out of luck")

    monkeypatch.setattr("launch.sweep.run_target", run)
    assert main(["demo", "--multirun", "seed=1,2", f"run.root={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert tried == ["seed=1", "seed=2"]
    assert "error: seed=1: RuntimeError: out of luck" in printed.err
    assert "missing: 1: seed=1: RuntimeError: out of luck" in printed.out
    assert "1 not finished; for the table with them: python -m launch report" in printed.out, "such as a submitted one"


def test_a_sweep_that_is_asked_to_stop_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tried = []

    def run(target: str, overrides: list[str], *, dry_run: bool) -> None:
        tried.append(overrides[0])
        raise preemption.Preempted("distill stopped at 512 tokens")

    monkeypatch.setattr("launch.sweep.run_target", run)
    command = ["prepare_data", "--multirun", "seed=1,2", f"run.root={tmp_path}"]
    assert main(command) == preemption.EXIT_STATUS
    assert tried == ["seed=1"]
    assert "distill stopped at 512 tokens; the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr("launch.sweep.run_target", lambda *_, **__: tried.append("again"))
    assert main(command) == 0
    assert tried[1:] == ["again", "again"], "what stopped is not remembered"
