"""A whole pico pipeline with W&B offline, and what W&B's own files say of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill import wandb_run
from distill.config import TrackingConfig
from launch import pipeline as pipeline_module
from launch import preemption, wandb_steps
from launch.__main__ import main
from launch.artifact import Artifact
from launch.config import compose_pipeline
from launch.pipeline import Listener, PlannedStep, plan, run_steps
from launch.rundir import RunDirectory
from launch.single_step import run_step
from launch.stage import StageContext
from launch.store import Store
from tests.wandb_files import OfflineRun, read_runs

pytest.importorskip("wandb")

SECRET = "0123456789abcdef" * 2 + "deadbeef"
PICO = [
    "data.train_tokens=6000",
    "data.validation_tokens=1500",
    "data.calibration_tokens=1500",
    "data.vocab_size=300",
    "pretrain.num_blocks=4",
    "pretrain.hidden_dim=32",
    "pretrain.num_heads=4",
    "pretrain.num_kv_heads=2",
    "pretrain.ffn_dim=256",
    *(f"pretrain.train.{text}" for text in ("max_tokens=512", "seq_len=32", "batch_size=8", "eval_sequences=4")),
    "library.bld.max_tokens=256",
    "library.bld.seq_len=32",
    "library.importance_sequences=4",
    "scores.num_sequences=4",
    "scores.seq_len=32",
    "costs.sources=[analytic]",
    "hardware@costs.hardware=h100_sxm",
    "search.cost_table=analytic",
    "search.constraint.latency_frac=0.5",
    "dependency.num_sequences=2",
    "dependency.seq_len=32",
    *(f"distill.{text}" for text in ("max_tokens=1024", "seq_len=32", "batch_size=8", "eval_every_tokens=256")),
    "distill.resume_every_tokens=512",
    "distill.eval_sequences=4",
    "extend_context.phases=[{seq_len: 64, max_tokens: 512, batch_size: 4}]",
    "evaluate.num_sequences=4",
    "evaluate.seq_len=32",
    "evaluate.lengths=[]",
    "benchmark.repeats=1",
    "workload.prefill_tokens=8",
    "workload.generated_tokens=4",
]
WITHOUT = "extended"
INPUTS = {"distilled": {"student": "fused", "teacher": "parent", "data": "data"}}


def steps(*overrides: str) -> list[PlannedStep]:
    """The demo without its longer contexts."""
    arguments = [*PICO, *overrides]
    pipeline = compose_pipeline("demo", arguments)
    kept = {name: step for name, step in pipeline.steps.items() if name != WITHOUT}
    compared = {key: name for key, name in kept["evaluation"].inputs.items() if name != WITHOUT}
    kept["evaluation"] = replace(kept["evaluation"], inputs=compared)
    kept["exported"] = replace(kept["exported"], inputs={"model": "distilled"})
    return plan(replace(pipeline, steps=kept), arguments)


def execute(root: Path, planned: list[PlannedStep], *, wandb: str, name: str = "pico") -> dict[str, Artifact]:
    run = RunDirectory(root=root, name=name)
    store = Store(run.store)
    context = StageContext(
        out=run.path,
        resume=run.path,
        pool=store.pool,
        run_name=run.name,
        step_name="",
        tracking=TrackingConfig(wandb=wandb),  # type: ignore[arg-type]
        run_dir=run.path,
    )
    silent = Listener(started=lambda *_: None, waiting=lambda _: None, finished=lambda *_: None)
    with run.held():
        return run_steps(planned, store=store, run=run, context=context, listener=silent)


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "_process", wandb_run._Process())
    for variable in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)


class Tracked:
    """The pipeline once, with a key in the environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps = steps()
        self.artifacts = execute(root, self.steps, wandb="offline")
        self.runs = {run.name.partition("/")[2]: run for run in read_runs(root / "pico")}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_run, "_process", wandb_run._Process())
        patch.setenv("WANDB_API_KEY", SECRET)
        return Tracked(tmp_path_factory.mktemp("tracked"))


def test_every_step_is_a_run_of_the_group(tracked: Tracked) -> None:
    assert tracked.runs.keys() == {step.name for step in tracked.steps}
    for step in tracked.steps:
        run = tracked.runs[step.name]
        assert (run.group, run.job_type, run.exit_code) == ("pico", step.recipe.stage, 0)
        assert run.step_metrics == {"*": "tokens"}
        assert all("tokens" in row for row in run.history)
        assert run.config["step"]["fingerprint"] == step.recipe.fingerprint
        assert run.summary["result/headline"] == tracked.artifacts[step.name].manifest.headline
    assert len({run.id for run in tracked.runs.values()}) == len(tracked.steps)
    assert tracked.runs["distilled"].config["distill"]["max_tokens"] == 1024


def test_curves_are_those_of_the_file(tracked: Tracked) -> None:
    file = tracked.artifacts["distilled"].path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sent = tracked.runs["distilled"].history
    assert [{key: value for key, value in row.items() if not key.startswith("_")} for row in sent] == rows
    held_out = [row for row in rows if "eval/kld" in row]
    assert [row["tokens"] for row in held_out] == [0, 256, 512, 768, 1024]
    names = {"eval/lm_loss_gap", "eval/top1_agreement_frac", "eval/retained_frac", "eval/gap_closed_frac"}
    assert all(row.keys() >= names for row in held_out)


def test_the_search_is_a_table_of_blocks_and_one_of_the_front(tracked: Tracked) -> None:
    solution = json.loads((tracked.artifacts["search"].path / "solution.json").read_text())
    run = tracked.runs["search"]
    blocks = run.table("search/blocks")
    assert [row["chosen"] for row in blocks] == solution["solutions"][0]["blocks"]
    assert [row["block"] for row in blocks] == list(range(4))
    assert {row["parent"] for row in blocks} == {"kv2+w256"}
    assert sum(row["score"] for row in blocks) == pytest.approx(solution["solutions"][0]["score"])
    assert [row["budget"] for row in run.table("search/pareto")] == [row["latency_frac"] for row in solution["pareto"]]
    assert run.summary["search/score"] == solution["solutions"][0]["score"]
    assert run.file("search/pareto_front").count("<svg") == 1


def test_figures_and_results_of_the_other_steps(tracked: Tracked) -> None:
    assert "cosine distance" in tracked.runs["dependency"].file("dependency/heat_map")
    measured = json.loads((tracked.artifacts["dependency"].path / "dependency.json").read_text())["matrix"]
    pairs = tracked.runs["dependency"].table("dependency/pairs")
    assert {(row["removed block"], row["measured block"]): row["cosine distance"] for row in pairs} == {
        (i, j): value for i, line in enumerate(measured) for j, value in enumerate(line) if value is not None
    }
    for step in ("child", "fused"):
        assert "block of the parent" in tracked.runs[step].file("architecture/strip")
    evaluated = json.loads((tracked.artifacts["evaluation"].path / "evaluate.json").read_text())["models"]
    models = {row["model"]: row for row in tracked.runs["evaluation"].table("evaluate/models")}
    assert {name: row["lm_loss"] for name, row in models.items()} == {n: row["lm_loss"] for n, row in evaluated.items()}
    assert models["parent"]["retained_frac"] == 1
    assert tracked.runs["evaluation"].summary["evaluate/fused/kld"] == evaluated["fused"]["kld"]
    assert len(tracked.runs["speed"].table("benchmark/models")) == 4
    assert tracked.runs["scores"].table("scores/variants")
    assert tracked.runs["costs"].table("costs/subblocks")


def test_lineage_by_reference_from_the_parent_to_the_export(tracked: Tracked) -> None:
    made = {}
    for step in tracked.steps:
        artifact, run = tracked.artifacts[step.name], tracked.runs[step.name]
        (record,) = run.outputs.values()
        made[step.name] = (record.name, record.digest)
        assert (record.name, record.type) == (step.recipe.stage, artifact.manifest.kind)
        assert {*record.aliases} == {"latest", "pico", f"pico.{step.name}", step.recipe.fingerprint[:16]}
        assert json.loads(record.metadata)["fingerprint"] == step.recipe.fingerprint
        # References alone: the bytes stay where they are.
        uri = artifact.path.resolve().as_uri()
        assert {entry.ref for entry in record.manifest.contents} == {
            f"{uri}/{file.name}" for file in (*artifact.manifest.files,)
        } | {f"{uri}/artifact.json"}
        assert not any(entry.local_path for entry in record.manifest.contents)
        # What it takes is what the other step gives, version by version.
        assert {(found.name, found.digest) for found in run.inputs.values()} == {
            made[source] for source in step.inputs.values()
        }
    assert made["exported"][0] == "export"


def test_tracking_changes_neither_fingerprints_nor_results(tracked: Tracked, tmp_path: Path) -> None:
    kept = [step for step in steps() if step.name in ("data", "parent")]
    plain = execute(tmp_path, kept, wandb="off")
    assert not [*(tmp_path / "pico").glob("*wandb*")]
    for name, artifact in plain.items():
        other = tracked.artifacts[name].manifest
        assert artifact.manifest.fingerprint == other.fingerprint
        assert {f.name: f.sha256 for f in artifact.manifest.files if f.name != "metrics.jsonl"} == {
            f.name: f.sha256 for f in other.files if f.name != "metrics.jsonl"
        }


def test_no_file_has_the_key(tracked: Tracked) -> None:
    files = [path for path in tracked.root.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_key_among_the_overrides_is_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("tracking.api_key", "+tracking.api_key", "WANDB_API_KEY", "tracking.wandb_api_key"):
        assert main(["demo", f"run.root={tmp_path / 'runs'}", f"{text}={SECRET}"]) == 2
        said = capsys.readouterr()
        assert "unknown key" in said.err
        assert SECRET not in said.out + said.err
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_says_nothing_again_and_another_group_sees_the_same(tracked: Tracked) -> None:
    again = execute(tracked.root, tracked.steps, wandb="offline")
    assert len(read_runs(tracked.root / "pico")) == len(tracked.steps)
    kept = [step for step in tracked.steps if step.name in ("data", "parent")]
    execute(tracked.root, kept, wandb="offline", name="other")
    parent = {run.name: run for run in read_runs(tracked.root / "other")}["other/parent"]
    first = tracked.runs["parent"]
    assert parent.id != first.id
    assert parent.outputs["pretrain"].digest == first.outputs["pretrain"].digest
    curve = [row["train/loss"] for row in parent.history if "train/loss" in row]
    assert curve == [row["train/loss"] for row in first.history if "train/loss" in row]
    assert again["parent"].manifest.fingerprint == tracked.artifacts["parent"].manifest.fingerprint


def alone(root: Path, planned: list[PlannedStep], step: str, *, wandb: str, name: str) -> None:
    """One step as a job of a cluster runs it."""
    run = RunDirectory(root=root, name=name)
    run.path.mkdir(exist_ok=True)
    store, tracking = Store(run.store), TrackingConfig(wandb=wandb)  # type: ignore[arg-type]
    context = StageContext(
        out=run.path,
        resume=run.path,
        pool=store.pool,
        run_name=name,
        step_name="",
        tracking=tracking,
        run_dir=run.path,
    )
    silent = Listener(started=lambda *_: None, waiting=lambda _: None, finished=lambda *_: None)
    run_step(planned, step, store=store, run=run, context=context, listener=silent)


def test_a_job_whose_step_is_committed_shows_it_once(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module.processes, "run_body", lambda *_: pytest.fail("it is there"))
    alone(tracked.root, tracked.steps, "parent", wandb="off", name="jobs")
    assert not [*(tracked.root / "jobs").glob("*wandb*")]
    for _ in range(2):
        alone(tracked.root, tracked.steps, "parent", wandb="offline", name="jobs")
    (run,) = read_runs(tracked.root / "jobs")
    first = tracked.runs["parent"]
    assert (run.name, run.group, run.job_type, run.exit_code) == ("jobs/parent", "jobs", "pretrain", 0)
    assert [row["_step"] for row in run.history] == [row["_step"] for row in first.history]
    assert [row.get("train/loss") for row in run.history] == [row.get("train/loss") for row in first.history]
    assert run.outputs["pretrain"].digest == first.outputs["pretrain"].digest
    assert {(found.name, found.digest) for found in run.inputs.values()} == {
        (found.name, found.digest) for found in first.inputs.values()
    }
    assert run.summary["result/headline"] == tracked.artifacts["parent"].manifest.headline
    assert run.config["step"]["fingerprint"] == tracked.artifacts["parent"].manifest.fingerprint


def test_a_job_that_was_killed_behind_its_commit_shows_the_step_when_it_starts_again(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = steps("data.train_tokens=5500")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wandb_steps._Step, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            alone(tracked.root, changed, "data", wandb="offline", name="cut")
    (first,) = read_runs(tracked.root / "cut")
    assert first.outputs == {}
    first.directory.rename(first.directory.with_name("offline-run-00000000_000000-cut"))
    alone(tracked.root, changed, "data", wandb="offline", name="cut")
    before, after = read_runs(tracked.root / "cut")
    assert before.id == after.id
    assert after.outputs.keys() == {"prepare_data"}
    assert after.exit_code == 0


def test_submission_shows_the_steps_that_need_no_job(
    tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "site.yaml").write_text("partition: gpu\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FUSION_SITE", str(tmp_path / "site.yaml"))
    places = [f"run.root={tracked.root}", "run.name=submitted", "cluster=slurm", "cluster.gpus_per_node=1"]
    command = ["demo", *PICO, *places, "tracking.wandb=offline"]
    assert main([*command, "--dry-run"]) == 0
    assert not (tracked.root / "submitted").exists()
    assert main(command) == 0
    shown = {run.name.partition("/")[2]: run for run in read_runs(tracked.root / "submitted")}
    jobs = {path.stem for path in (tracked.root / "submitted" / "slurm").glob("*.sbatch")}
    # The reference was made without a longer context, and what depends on it.
    assert jobs >= {WITHOUT, "evaluation", "exported"}
    assert shown.keys() == {step.name for step in tracked.steps} - jobs
    for name, run in shown.items():
        assert (run.group, run.exit_code) == ("submitted", 0)
        assert [record.digest for record in run.outputs.values()] == [
            record.digest for record in tracked.runs[name].outputs.values()
        ]


def attempts(root: Path, name: str) -> list[OfflineRun]:
    return [run for run in read_runs(root / name) if run.name.endswith("/distilled")]


def test_a_preempted_run_goes_on_without_a_row_twice(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal after two of four optimizer steps, and started again."""
    changed = steps("steps.distilled.optim.lr=2e-4", "steps.distilled.distill.eval_every_tokens=0")
    asked = iter([False, True])
    monkeypatch.setattr(preemption, "should_stop", lambda: next(asked, False))
    with pytest.raises(preemption.Preempted):
        execute(tracked.root, changed, wandb="offline", name="stopped")
    monkeypatch.setattr(preemption, "should_stop", lambda: False)
    # Attempts that start within one second would share their directory.
    (directory,) = (run.directory for run in attempts(tracked.root, "stopped"))
    directory.rename(directory.with_name("offline-run-00000000_000000-stopped"))
    artifacts = execute(tracked.root, changed, wandb="offline", name="stopped")
    first, second = attempts(tracked.root, "stopped")
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.id == second.id
    assert first.may_resume
    assert second.may_resume
    file = artifacts["distilled"].path / "metrics.jsonl"
    rows = [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
    sent = [row for run in (first, second) for row in run.history]
    assert [row["_step"] for row in sent] == list(range(len(rows)))
    assert [row["tokens"] for row in sent] == rows


def test_a_failed_step_is_a_failed_run(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline_module.processes, "run_body", fail)
    changed = [step for step in steps("data.train_tokens=5000") if step.name == "data"]
    with pytest.raises(RuntimeError, match="out of memory"):
        execute(tracked.root, changed, wandb="offline", name="failed")
    (run,) = read_runs(tracked.root / "failed")
    assert (run.exit_code, run.job_type, run.outputs) == (1, "prepare_data", {})


ONLINE = """
import sys
from pathlib import Path
from tests.launch.test_wandb_steps import execute, steps
try:
    execute(Path(sys.argv[1]), [step for step in steps() if step.name == "data"], wandb="online")
except ValueError as error:
    print(error)
"""


def go_online(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Step data online in a process of its own: W&B keeps a login, and a service, in a process that has had one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nowhere = {"NETRC": str(root / "none"), "WANDB_CONFIG_DIR": str(root), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-W", "always", "-c", ONLINE, str(root)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**inherited, **nowhere, **environment},
        cwd=Path(__file__).parents[2],
    )


def test_online_without_a_login_stops_before_any_work(tmp_path: Path) -> None:
    done = go_online(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"tracking.wandb=online needs a W&B login.*tracking.wandb=offline\n", done.stdout)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_server_that_is_not_there_leaves_the_runs_offline(tmp_path: Path) -> None:
    done = go_online(tmp_path, WANDB_API_KEY=SECRET, WANDB_INIT_TIMEOUT="2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the further runs of this process are kept offline") == 1
    (run,) = read_runs(tmp_path / "pico")
    assert (run.name, run.exit_code) == ("pico/data", 0)
    assert run.outputs.keys() == {"prepare_data"}
