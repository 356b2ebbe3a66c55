from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.recovered import gap_closed_frac
from launch.recovery import RecoveryCurve, read_curves, reference_model


@pytest.mark.parametrize(
    ("model", "expected"),
    [(3.0, 0.0), (2.0, 1.0), (2.25, 0.75), (1.9, 1.1), (3.5, -0.5)],
)
def test_gap_closed(model: float, expected: float) -> None:
    assert gap_closed_frac(parent=2.0, reference=3.0, model=model) == pytest.approx(expected)


@pytest.mark.parametrize("reference", [2.0, 1.9])
def test_there_is_nothing_to_close_where_the_reference_is_not_worse(reference: float) -> None:
    assert gap_closed_frac(parent=2.0, reference=reference, model=1.5) is None


def test_the_reference_is_the_worst_model_of_surgery() -> None:
    lm_loss = {"parent": 2.0, "child": 2.5, "fused": 2.8, "distilled": 9.0, "extended": 9.0}
    stages = {
        "parent": "pretrain",
        "child": "assemble",
        "fused": "fuse",
        "distilled": "distill",
        "extended": "extend_context",
    }

    assert reference_model(lm_loss, stages) == "fused"


def test_without_surgery_there_is_no_reference() -> None:
    assert reference_model({"parent": 2.0, "distilled": 2.1}, {"parent": "pretrain", "distilled": "distill"}) is None


def write_rows(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_curves_hold_the_points_of_their_metric_in_order(tmp_path: Path) -> None:
    rows = [
        {"tokens": 0, "eval/kld": 0.9},
        {"tokens": 64, "train/kld": 0.8},
        {"tokens": 128, "train/kld": 0.7},
        {"tokens": 128, "eval/kld": 0.5},
        {"tokens": 128, "eval/kld": 0.6},
    ]

    curves = read_curves(write_rows(tmp_path / "metrics.jsonl", rows), "distilled", ("eval/kld", "eval/lm_loss"))

    expected = RecoveryCurve(step="distilled", metric="eval/kld", tokens=(0, 128, 128), values=(0.9, 0.5, 0.6))
    assert curves == [expected], "a metric without a point has no curve; the next phase begins where one ends"


@pytest.mark.parametrize("line", ['{"tokens": 3, "eval/kl', "[1]", '{"eval/kld": 1.0}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"tokens": 0, "eval/kld": 1.0}\n' + line + "\n")

    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a JSON object with `tokens`"):
        read_curves(path, "distilled", ("eval/kld",))
