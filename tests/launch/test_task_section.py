"""lm-eval tasks on the page and in W&B."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.artifact import Artifact
from launch.finished_run import FinishedRun
from launch.report import write_report
from launch.task_section import task_table
from launch.wandb_content import content_of


def cells(row: str) -> list[str]:
    return [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]


def test_the_page_has_every_task_by_every_model(full_steps: dict[str, Artifact], tmp_path: Path) -> None:
    page = write_report(tmp_path, "demo", full_steps).read_text()
    section = page[page.index("<h2>Tasks</h2>") :].partition("</section>")[0]
    head, subhead, mmlu, gsm8k, mean = (cells(row) for row in re.findall(r"<tr>.*?</tr>", section, re.S))
    assert head == ["task", "metric", "examples", "parent", "child", "fused", "distilled", "extended"]
    assert subhead == ["value", *4 * ["value", "recovered"]]
    assert mmlu[:6] == ["mmlu", "acc", "14,042", "0.500 ± 0.004", "0.450 ± 0.004", "90.0%"]
    assert gsm8k == ["gsm8k", "exact_match,strict-match", "1,319 (7 cut)", "0.000", *4 * ["0.000", "\N{EN DASH}"]]
    assert [cell for cell in mean if cell] == ["mean of 1 of 2 tasks", "90.0%", "85.0%", "96.2%", "97.0%"]


def test_without_tasks_there_is_no_section(short: Any, tmp_path: Path) -> None:
    assert task_table(FinishedRun(short.steps)) is None
    assert "<h2>Tasks</h2>" not in write_report(tmp_path, "short", short.steps).read_text()


def test_wandb_has_them_as_a_table_and_in_the_summary(full_steps: dict[str, Artifact]) -> None:
    content = content_of(full_steps["evaluation"])
    table = content.tables["evaluate/tasks"]
    assert table.columns == ("model", "task", "metric", "value", "stderr", "n", "num_truncated", "recovery_frac")
    assert len(table.rows) == 5 * 2
    assert table.rows[1] == ("parent", "gsm8k", "exact_match,strict-match", 0.0, None, 1319, 7, None)
    assert content.summary["evaluate/child/tasks/mmlu/acc"] == pytest.approx(0.45)
    assert content.summary["evaluate/child/tasks/mmlu/recovery_frac"] == pytest.approx(0.9)
    assert content.summary["evaluate/child/tasks/gsm8k/exact_match,strict-match"] == 0
    assert "evaluate/child/tasks/gsm8k/recovery_frac" not in content.summary
    assert content.summary["evaluate/child/tasks_recovery_frac"] == pytest.approx(0.9)


def test_wandb_takes_the_gap_from_the_file(full_steps: dict[str, Artifact]) -> None:
    models = json.loads((full_steps["evaluation"].path / "evaluate.json").read_text())["models"]
    content = content_of(full_steps["evaluation"])
    for name, row in models.items():
        assert content.summary[f"evaluate/{name}/lm_loss_gap"] == row["lm_loss_gap"]
