from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.artifact import Artifact
from launch.report import write_report


def written_report(run_dir: Path, steps: dict[str, Artifact]) -> dict[str, Any]:
    page = write_report(run_dir, "demo", steps)
    assert page == run_dir / "report" / "index.html"
    return json.loads((run_dir / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def report(full_steps: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return written_report(tmp_path_factory.mktemp("report"), full_steps)


def test_evidence(report: dict[str, Any]) -> None:
    evidence = report["evidence"]

    assert evidence["num_attentions_removed"] == 5
    assert evidence["num_ffn_runs_fused"] == 1
    assert evidence["fused_equals_parallel_sum_max_relative_error"] == 3e-7
    assert evidence["lm_loss_gap_closed_frac"] == pytest.approx((4.1 - 3.65) / (4.1 - 3.5)), "of distilled"
    ratios = {"parent": 1.0, "child": 3.0 / 4.0, "fused": 2.8 / 4.0, "distilled": 2.8 / 4.0}
    assert evidence["decode_latency_vs_parent"] == pytest.approx(ratios)
    assert evidence["parent_validation_lm_loss"] == 3.5
    assert evidence["unigram_entropy_nats"] == 5.9


def test_models_stand_in_pipeline_order_each_with_its_part(report: dict[str, Any]) -> None:
    assert list(report["models"]) == ["parent", "child", "fused", "distilled", "extended"]
    names = {key: report[key] for key in ("final_model", "timed_model", "distilled_model", "recovery_reference")}
    assert list(names.values()) == ["extended", "distilled", "distilled", "fused"]
    assert report["models"]["extended"]["tokens"] == 550_000


def test_models_are_counted_from_their_architecture(report: dict[str, Any]) -> None:
    fused = report["models"]["fused"]

    assert (fused["num_blocks"], fused["num_attentions"]) == (9, 7)
    # A key and a value of 4 heads x 32 channels x 4 bytes in each of the 7 attentions that are left.
    assert fused["kv_bytes_per_token"] == 7 * 2 * 4 * 32 * 4
    assert report["models"]["child"]["num_params"] == fused["num_params"] + 3 * 256, "fusion saves three norms"


def test_recovery_is_that_of_trained_models_and_of_the_reference(report: dict[str, Any]) -> None:
    recovery = {name: model["lm_loss_gap_closed_frac"] for name, model in report["models"].items()}

    expected = {"parent": None, "child": None, "fused": 0.0, "distilled": 0.75, "extended": 0.8}
    assert recovery == pytest.approx(expected)


def test_latencies_and_searches_say_what_they_are_stated_for(report: dict[str, Any]) -> None:
    assert report["workload"]["prefill_tokens"] == 128
    assert report["hardware"] == "Synthetic CPU"
    assert [search["step"] for search in report["searches"]] == ["solution", "baseline"]
    assert all(search["workload"]["dtype"] == "float32" for search in report["searches"])


def test_steps(report: dict[str, Any]) -> None:
    assert [step["step"] for step in report["steps"]][:3] == ["data", "parent", "library"]
    assert report["steps"][2]["seconds"] == 31.5
    assert all(len(step["fingerprint"]) == 64 for step in report["steps"])


def test_without_evaluation_and_benchmark_nothing_is_claimed(short: Any, tmp_path: Path) -> None:
    report = written_report(tmp_path, short.steps)

    assert list(report["models"]) == ["parent", "pruned", "fused"]
    evidence = report["evidence"]
    assert evidence["num_attentions_removed"] == 5
    assert evidence["lm_loss_gap_closed_frac"] is None
    assert evidence["decode_latency_vs_parent"] == {}
    assert (report["workload"], report["hardware"], report["searches"]) == (None, None, [])
    assert report["models"]["parent"]["kv_bytes_per_token"] == 12 * 2 * 4 * 32 * 4, "in the data type of the weights"


def test_no_recovery_is_claimed_where_surgery_did_no_harm(short: Any, tmp_path: Path) -> None:
    losses = {"parent": 3.5, "fused": 3.4, "distilled": 3.3}
    measured = {"kld": 0.1, "top1_agreement_frac": 0.9, "by_length": {}}
    evaluation = {"models": {name: {"lm_loss": loss, **measured} for name, loss in losses.items()}}
    config = json.loads((short.steps["fused"].path / "config.json").read_text())
    files = {"config.json": config, "metrics.jsonl": ""}
    short.step("distilled", "distill", "model", files, {"student": "fused", "teacher": "parent", "data": "data"})
    compared = {name: name for name in (*losses, "data")}
    short.step("evaluation", "evaluate", "report", {"evaluate.json": evaluation}, compared)

    report = written_report(tmp_path, short.steps)

    assert report["models"]["distilled"]["lm_loss_gap_closed_frac"] is None
    assert report["evidence"]["lm_loss_gap_closed_frac"] is None
    assert "Gap closed" not in (tmp_path / "report" / "index.html").read_text()


def test_a_run_without_a_model_has_no_report(short: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a run of data has no model to report on"):
        write_report(tmp_path / "short", "short", {"data": short.steps["data"]})
