"""The recovery benchmark, with the stages as they are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.launch.training_inputs import write_teacher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = [
    "engine.device=cpu",
    "data.train_tokens=1000",
    "data.validation_tokens=500",
    "data.calibration_tokens=500",
    "prune_attention.num_sequences=2",
    "prune_attention.seq_len=16",
    "evaluate.num_sequences=4",
    "evaluate.seq_len=16",
    "distill.seq_len=16",
    "distill.batch_size=4",
    "distill.eval_sequences=4",
    "optim.lr=1e-3",
]
SMALL = ["--num-attentions", "3", "--curve-tokens", "640", "--ablation-tokens", "256", "--points", "2"]


@pytest.fixture
def source(pico_parent_dir: Path, tmp_path: Path) -> Path:
    """A parent that prefers some tokens to others, so that pruning its attention costs something."""
    return write_teacher(tmp_path / "source", pico_parent_dir).path


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recovery")


def arguments(source: Path, root: Path, *more: str) -> list[str]:
    places = ["--root", str(root / "runs"), "--out", str(root / "out")]
    return [*places, *SMALL, *more, "--set", *TINY, f"model.source={source}"]


def results(root: Path) -> dict:
    return json.loads((root / "out" / "recovery.json").read_text())


def test_rows_and_curves_are_written_and_a_second_call_goes_on(
    program: ModuleType, source: Path, tmp_path: Path
) -> None:
    first = arguments(source, tmp_path, "--curves", "kld", "--objectives", "kld", "lm")
    # No time is left once the student is there: it is judged and written all the same.
    assert program.main([*first, "--time-limit", "0"]) == 0
    cut = results(tmp_path)
    assert cut["untrained"]["kld"] > 0
    assert set(cut["missing"].values()) == {"no time was left"}
    assert set(cut["missing"]) == {"kld_curves", "kld_ablation", "lm_ablation"}

    assert program.main(first) == 0
    found = results(tmp_path)
    assert found["missing"] == {}
    assert found["untrained"] == cut["untrained"]
    assert found["seconds"]["fused"] == cut["seconds"]["fused"]
    lm, kld = found["tables"]["ablation"]
    assert (lm["objective"], kld["objective"]) == ("lm", "kld")
    assert kld["tokens"] == lm["tokens"] == 256
    # One of them is trained towards the parent, the other one away from it.
    assert kld["kld"] < found["untrained"]["kld"] < lm["kld"]
    assert lm["lm_loss"] < kld["lm_loss"]
    curves = {curve["metric"]: curve for curve in found["curves"]["curves"]["kld"]}
    assert curves["eval/kld"]["tokens"] == [0, 320, 640]
    # Every run starts from the same weights and is measured on the same text.
    starts = {found["curves"]["ablation"][name][0]["values"][0] for name in ("kld", "lm")}
    assert starts == {curves["eval/kld"]["values"][0]}
    assert "parent" in (tmp_path / "out" / "recovery_lm_loss.svg").read_text()
    text = (tmp_path / "out" / "recovery.md").read_text()
    assert "|  |  | x | " in text
    assert "| x |  |  | " in text


def test_a_row_that_is_refused_does_not_take_the_others(program: ModuleType, source: Path, tmp_path: Path) -> None:
    # Its learning rate makes a loss that is not a number, at once without a bound on the gradient.
    broken = "steps.kld_ablation.optim.lr=1e30"
    options = arguments(source, tmp_path, "--curves", "--objectives", "kld", "lm")
    assert program.main([*options, broken, "steps.kld_ablation.optim.warmup_frac=0.0"]) == 0
    found = results(tmp_path)
    assert [row["objective"] for row in found["tables"]["ablation"]] == ["lm"]
    assert "kld_ablation" in found["missing"]
    assert "- kld_ablation: " in (tmp_path / "out" / "recovery.md").read_text()


def test_settings_that_would_make_all_rows_alike_are_refused(
    program: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*arguments(source, tmp_path), "objective=kld"]) == 2
    assert "objective=kld would hold for every row" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_parent_s_own_text_is_made_where_the_data_has_a_share_of_it(
    program: ModuleType, source: Path, tmp_path: Path
) -> None:
    options = program._parser().parse_args([*arguments(source, tmp_path), "data=generated"])
    steps = program.base_steps(options, longest=1000)
    assert steps["data"].inputs == {"parent": "parent", "generated": "text"}
    assert steps["text"].stage == "generate_text"
    # Steps of 64 tokens: 16 of them are the first that reach the budget.
    assert steps["data"].overrides == ("data.train_tokens=1024",)
    options.set.append("distill.data_end=repeat")
    assert program.base_steps(options, longest=1_000_000)["data"].overrides == ("data.train_tokens=1000",)
