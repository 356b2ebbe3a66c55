from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from fusion.controls import removed_architecture
from launch.artifact import Artifact
from launch.cost_section import latency_parts
from launch.finished_run import FinishedRun, read_architecture
from launch.report import write_report
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import Architecture
from puzzle.model.hf_config import hf_config
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost


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


def test_a_full_disk_leaves_the_report_that_was_there(
    full_steps: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written_report(tmp_path, full_steps)
    write_text = Path.write_text

    def full(path: Path, text: str, **named: Any) -> int:
        if "index.html" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ValueError, match=r"^the disk under .* is full .* while the report wrote; free") as caught:
            write_report(tmp_path, "another", full_steps)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "report.json"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == before


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


def add_control(run: Any, step: str, treatment: str) -> Architecture:
    """The output of a fuse step that removed or reversed two of the FFNs of ``pruned``."""
    pruned = read_architecture(run.steps["pruned"])
    first, *_ = next(pruned.attention_free_runs())
    if treatment == "remove":
        model = removed_architecture(pruned, (first + 1, first + 2))
    else:
        order = [*range(first), first + 1, first, *range(first + 2, pruned.num_blocks)]
        model = pruned.with_blocks(tuple(pruned.blocks[index] for index in order))
    files = {"config.json": hf_config(model, "float32"), "fusion.json": {"treatment": treatment, "verify": {}}}
    run.step(step, "fuse", "model", files, {"model": "pruned"})
    return model


@pytest.mark.parametrize(("treatment", "num_removed"), [("remove", 2), ("reverse", 0)])
def test_a_control_is_not_reported_as_fused(short: Any, tmp_path: Path, treatment: str, num_removed: int) -> None:
    model = add_control(short, "control", treatment)

    report = written_report(tmp_path, short.steps)

    assert report["final_model"] == "control"
    assert report["evidence"]["num_ffn_runs_fused"] == 0
    assert report["evidence"]["num_blocks_removed"] == num_removed
    assert report["evidence"]["fused_equals_parallel_sum_max_relative_error"] is None
    run = FinishedRun(short.steps)
    assert run.unfused is run.final, "nothing in it is fused"
    assert run.fusions == ()
    parts = latency_parts(model, read_architecture(run.unfused), merge_table(model), "decode")
    assert parts["FFN"] == pytest.approx(0.1 * model.num_blocks), "no merge is charged"
    page = (tmp_path / "report" / "index.html").read_text()
    assert "FFNs fused to width" not in page
    assert "equals the parallel sum" not in page
    assert ("2 blocks removed" in page) == (treatment == "remove")


def merge_table(model: Architecture) -> CostTable:
    """Every FFN takes 0.1 ms, a merge saves 0.03 ms, all else is free."""
    variants = {("attention", block.attention.name): 0.0 for block in model.blocks}
    variants |= {("ffn", block.ffn.name): 0.1 for block in model.blocks}
    sizes = {"params": 0, "weight_bytes": 0}
    return CostTable(
        source="measured",
        hardware="a CPU",
        workload=WorkloadConfig(),
        kv_tokens=256,
        overhead=OverheadCost(prefill_ms=0.0, decode_ms=0.0, **sizes),
        subblocks=tuple(
            SubblockCost(
                subblock=subblock,  # type: ignore[arg-type]
                variant=variant,
                prefill_ms=ms,
                decode_ms=ms,
                kv_bytes_per_token=0,
                **sizes,
            )
            for (subblock, variant), ms in variants.items()
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=0.0, decode_ms=0.03),
    )


def test_evidence_is_of_the_final_models_own_line(short: Any, tmp_path: Path) -> None:
    """A control comes after the fusion, and another fusion beside it, but the model that is judged comes of neither."""
    config = json.loads((short.steps["fused"].path / "config.json").read_text())
    add_control(short, "control", "remove")
    beside = {"treatment": "fuse", "verify": {"max_relative_error_fp32": 7e-6}}
    short.step("beside", "fuse", "model", {"config.json": config, "fusion.json": beside}, {"model": "pruned"})
    trained = {"config.json": config, "metrics.jsonl": ""}
    short.step("mended", "distill_groups", "model", trained, {"model": "pruned", "fused": "fused", "data": "data"})
    short.step("distilled", "distill", "model", trained, {"student": "mended", "teacher": "parent", "data": "data"})
    measured = {"lm_loss": 3.5, "kld": 0.1, "top1_agreement_frac": 0.9, "by_length": {}}
    compared = {"parent": "parent", "distilled": "distilled"}
    evaluation = {"models": dict.fromkeys(compared, measured)}
    short.step("evaluation", "evaluate", "report", {"evaluate.json": evaluation}, {**compared, "data": "data"})

    evidence = written_report(tmp_path, short.steps)["evidence"]

    assert evidence["fused_equals_parallel_sum_max_relative_error"] == 3e-7
    assert (evidence["num_ffn_runs_fused"], evidence["num_blocks_removed"]) == (1, 0)
    run = FinishedRun(short.steps)
    line = [run.step_of(artifact) for artifact in run.line_of(run.final)]
    assert line == ["distilled", "mended", "fused", "pruned", "parent"]
    assert run.step_of(run.unfused) == "pruned"
    assert run.unfused_of(short.steps["control"]) == short.steps["control"]


def test_evidence_of_a_model_that_was_fused_twice_is_the_worse_one(short: Any, tmp_path: Path) -> None:
    config = json.loads((short.steps["fused"].path / "config.json").read_text())
    fusion = {"treatment": "fuse", "verify": {"max_relative_error_fp32": 4e-7}}
    short.step("again", "fuse", "model", {"config.json": config, "fusion.json": fusion}, {"model": "fused"})

    evidence = written_report(tmp_path, short.steps)["evidence"]

    assert evidence["fused_equals_parallel_sum_max_relative_error"] == 4e-7
