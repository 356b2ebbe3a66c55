"""The shipped pipeline `demo`, whole, through the command line, with budgets cut to a minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DATA = {"train": 30720, "validation": 4096, "calibration": 3072}
"""Tokens of every split: what the stages read of it, and not one more."""
TINY = [
    *(f"data.{split}_tokens={tokens}" for split, tokens in DATA.items()),
    "data.vocab_size=512",
    "pretrain.num_blocks=6",
    "pretrain.hidden_dim=64",
    "pretrain.train.max_tokens=30000",
    "pretrain.train.eval_every_tokens=0",
    "library.bld.max_tokens=4096",
    "library.importance_sequences=8",
    "scores.num_sequences=8",
    # Of a model this small, times on a busy machine say little, and what the search removes must not hang on them.
    "costs.sources=[analytic]",
    "hardware@costs.hardware=h100_sxm",
    "search.cost_table=analytic",
    "search.constraint.latency_frac=0.45",
    "dependency.num_sequences=4",
    "distill.max_tokens=8192",
    "distill.eval_every_tokens=0",
    "distill.eval_sequences=8",
    "extend_context.phases=[{seq_len: 256, max_tokens: 4096, batch_size: 4, rope: {theta: 20000.0}}]",
    "evaluate.num_sequences=16",
    "evaluate.lengths=[128,256]",
    "evaluate.num_needles=4",
    "benchmark.repeats=3",
]
STEPS = 14


def launch(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "launch", *arguments, f"run.root={root}"]
    # Elsewhere than the repository: nothing may be written into the directory that a command is typed in.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False, cwd=root)
    assert not [path for path in root.iterdir() if path.suffix == ".yaml"]
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    done = launch("demo", *TINY, "run.name=tiny", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("split", DATA)
def test_data_too_short_by_a_token_is_refused_before_anything_runs(split: str, tmp_path: Path) -> None:
    done = launch("demo", *TINY, f"data.{split}_tokens={DATA[split] - 1}", root=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: step \w+ on the data of step data: .*data\.{split}_tokens .*\n", done.stderr)
    assert not any(tmp_path.rglob("artifact.json"))


def test_every_step_leaves_its_artifact_and_a_report(root: Path) -> None:
    kinds = {
        link.name: json.loads((link / "artifact.json").read_text())["kind"]
        for link in (root / "tiny").iterdir()
        if link.is_symlink()
    }
    assert len(kinds) == STEPS
    assert kinds["fused"] == "model"
    assert kinds["search"] == "solution"
    report = json.loads((root / "tiny" / "report" / "report.json").read_text())
    evidence = report["evidence"]
    assert evidence["num_attentions_removed"] >= 2
    assert evidence["num_ffn_runs_fused"] >= 1
    assert evidence["fused_equals_parallel_sum_max_relative_error"] < 1e-5
    assert set(report["models"]) >= {"parent", "child", "fused", "distilled", "extended"}
    page = (root / "tiny" / "report" / "index.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_second_run_computes_nothing(root: Path) -> None:
    done = launch("demo", *TINY, "run.name=tiny", root=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cached") == STEPS


def test_sweep_shares_what_lies_upstream(root: Path) -> None:
    store = root / "store"
    before = {path.name for path in store.iterdir()}
    done = launch("demo", "--multirun", *TINY, "steps.distilled.optim.lr=1e-4,2e-4", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    added = [path.name.partition("-")[0] for path in store.iterdir() if path.name not in before]
    assert sorted(added) == sorted(["distill", "extend_context", "evaluate", "benchmark", "export"] * 2)
    assert len(list(store.glob("pretrain-*"))) == 1


def test_damaged_artifact_is_one_line(root: Path) -> None:
    file = root / "tiny" / "scores" / "scores.json"
    content = file.read_text()
    file.write_text(content.replace("0", "1", 1))
    try:
        done = launch("demo", *TINY, "run.name=tiny", root=root)
    finally:
        file.write_text(content)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "scores.json was altered" in done.stderr


def test_infeasible_budget_is_one_line(root: Path) -> None:
    done = launch("demo", *TINY, "search.constraint.latency_frac=0.01", "run.name=infeasible", root=root)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "step search" in done.stderr


def test_single_stage_takes_artifacts_by_path(root: Path) -> None:
    run = root / "tiny"
    done = launch("fuse", f"inputs.model={run / 'child'}", "fuse.norm=last", root=root)
    assert done.returncode == 0, done.stderr
    assert "artifact:" in done.stdout


def test_wrong_input_kind_is_one_line(root: Path) -> None:
    done = launch("fuse", f"inputs.model={root / 'tiny' / 'data'}", root=root)
    assert done.returncode == 2
    assert "must be of kind model, the artifact given is of kind data" in done.stderr


def test_report_can_be_made_again(root: Path) -> None:
    page = root / "tiny" / "report" / "index.html"
    page.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "launch", "report", str(root / "tiny")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert page.is_file()


def test_short_road_takes_a_checkpoint_and_text(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{n}: the square of {n} is {n * n}, as everybody knows." for n in range(4000))
    )
    done = launch(
        "attention_fusion",
        f"model.source={root / 'tiny' / 'parent'}",
        "model.dtype=float32",
        "data=text",
        f"data.sources.0.path={tmp_path / 'text.txt'}",
        "data.validation_tokens=4000",
        "data.calibration_tokens=4000",
        "prune_attention.num_attentions=3",
        "prune_attention.num_sequences=8",
        "prune_attention.seq_len=64",
        "dependency.num_sequences=8",
        "dependency.seq_len=64",
        "distill.max_tokens=4096",
        "distill.seq_len=64",
        "distill.eval_sequences=8",
        "evaluate.seq_len=64",
        "evaluate.num_sequences=8",
        "workload.prefill_tokens=32",
        "workload.generated_tokens=32",
        "benchmark.repeats=3",
        root=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 6 attentions" in done.stdout or "2 FFNs -> 1 fused" in done.stdout


@pytest.mark.slow
def test_unmodified_demo_shows_what_it_promises(tmp_path: Path) -> None:
    done = launch("demo", root=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    evidence = json.loads((tmp_path / "demo" / "report" / "report.json").read_text())["evidence"]
    assert evidence["num_attentions_removed"] >= 2
    assert evidence["num_ffn_runs_fused"] >= 1
    assert evidence["fused_equals_parallel_sum_max_relative_error"] < 1e-5
    assert evidence["lm_loss_gap_closed_frac"] >= 0.6
    assert evidence["parent_validation_lm_loss"] < evidence["unigram_entropy_nats"] - 1.5
