"""Data that is too short is known before the first step, and again when it is there.

That a pipeline runs on what is asked here, and on no token more, is in tests/integration/test_demo.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import PipelineConfig, StepConfig, compose_pipeline, compose_stage
from launch.data_sizes import check_data
from launch.pipeline import Listener, plan, run_steps
from launch.registry import STAGES
from launch.rundir import RunDirectory
from launch.single_step import run_step
from launch.stage import StageContext
from launch.store import Store

MANY = {"train": 10**12, "validation": 10**12, "calibration": 10**12}
READS: dict[str, tuple[list[str], int, str, int]] = {
    "pretrain": (
        ["pretrain.train.max_tokens=4096", "pretrain.train.seq_len=128", "pretrain.train.batch_size=8"],
        4096,
        "validation",
        32 * 128,
    ),
    "build_library": (
        ["library.bld.max_tokens=4096", "library.bld.seq_len=128", "library.bld.batch_size=8"],
        4096,
        "calibration",
        (32 + 16) * 128,
    ),
    "score_library": ([], 0, "calibration", 64 * 512),
    "check_additivity": (["scores.skip_sequences=3"], 0, "calibration", (3 + 64) * 512),
    "prune_attention": ([], 0, "calibration", 64 * 512),
    "measure_dependency": ([], 0, "calibration", 16 * 512),
    "score_groups": ([], 0, "calibration", 16 * 512),
    "distill_groups": (["group_distillation.train.max_tokens=8192"], 8192, "calibration", 16 * 512),
    "cache_teacher": (["teacher_cache.max_tokens=8192"], 8192, "validation", 32 * 512),
    "distill": (["distill.max_tokens=8192"], 8192, "validation", 32 * 512),
    "extend_context": (
        [
            "extend_context.phases=[{seq_len: 128, max_tokens: 1024, batch_size: 8}, "
            "{seq_len: 256, max_tokens: 4096, batch_size: 8}]",
            "extend_context.lengths=[256]",
        ],
        1024 + 4096,
        "validation",
        16 * 256,
    ),
    "evaluate": ([], 0, "validation", 64 * 512),
}
"""By stage that reads data: settings, tokens that they read of the train split, a held-out split and tokens of it."""


def test_every_stage_that_reads_data_is_here() -> None:
    assert {name for name, stage in STAGES.items() if "data" in stage.inputs} == READS.keys()


@pytest.mark.parametrize("name", READS)
def test_a_stage_wants_what_it_reads_and_not_a_token_more(name: str) -> None:
    overrides, train_tokens, split, held_out = READS[name]
    config = compose_stage(STAGES[name].config, overrides)
    enough = {"train": train_tokens, "validation": 0, "calibration": 0, split: held_out}
    check_data(config, enough)
    with pytest.raises(ValueError, match=rf"data\.{split}_tokens"):
        check_data(config, {**MANY, split: held_out - 1})
    if train_tokens:
        with pytest.raises(ValueError, match=r"data\.train_tokens"):
            check_data(config, {**MANY, "train": train_tokens - 1})


def test_a_run_may_repeat_short_data_and_a_probe_as_long_as_the_split_fits() -> None:
    distill = compose_stage(STAGES["distill"].config, ["distill.max_tokens=1000000", "distill.data_end=repeat"])
    check_data(distill, {**MANY, "train": 8192})
    evaluate = compose_stage(
        STAGES["evaluate"].config, ["evaluate.num_sequences=1", "evaluate.seq_len=64", "evaluate.lengths=[4096]"]
    )
    check_data(evaluate, {**MANY, "validation": 4096})
    with pytest.raises(ValueError, match=r"1 sequences of 4096 tokens .* raise data\.validation_tokens to 4096"):
        check_data(evaluate, {**MANY, "validation": 4095})


def test_cached_signals_are_all_that_a_run_sees() -> None:
    signals = compose_stage(STAGES["cache_teacher"].config, ["teacher_cache.max_tokens=8192"])
    distill = compose_stage(STAGES["distill"].config, ["distill.max_tokens=16384"])
    check_data(distill, MANY)
    beyond = r"distill\.max_tokens=16384 is beyond the data: 16 sequences .* raise teacher_cache\.max_tokens to 16384"
    with pytest.raises(ValueError, match=beyond):
        check_data(distill, MANY, signals)
    for setting, message in {
        "distill.seq_len=256": r"sequences of 512 tokens, this run has seq_len=256; set it to 512",
        "distill.eval_sequences=64": r"the teacher signals have 32 validation sequences",
        "distill.separate_documents=true": r"the teacher signals have separate_documents=False",
    }.items():
        other = compose_stage(STAGES["distill"].config, ["distill.max_tokens=8192", setting])
        with pytest.raises(ValueError, match=message):
            check_data(other, MANY, signals)
    with pytest.raises(ValueError, match=r"of 16 sequences of 512 tokens, the train split has 15; give the data that"):
        check_data(distill, {**MANY, "train": 8191}, signals)


def test_the_error_names_both_steps() -> None:
    demo = compose_pipeline("demo", [])
    message = (
        r"step distilled on the data of step data: distill\.max_tokens=600000 .* raise data\.train_tokens to 600064"
    )
    with pytest.raises(ValueError, match=message):
        plan(demo, ["data.train_tokens=500000", "pretrain.train.max_tokens=400000", "library.bld.max_tokens=50000"])


@pytest.mark.parametrize("is_single", [False, True])
def test_text_that_ends_before_its_tokens_ends_the_run_when_the_data_is_there(is_single: bool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Number {number} is followed by {number + 1}." for number in range(3000)))
    data = StepConfig(
        stage="prepare_data",
        overrides=(
            "data=text",
            f"data.sources.0.path={text}",
            "data.tokenizer=train",
            "data.train_tokens=2_000_000",
            "data.validation_tokens=2000",
            "data.calibration_tokens=2000",
        ),
    )
    parent = StepConfig(
        stage="pretrain",
        inputs={"data": "data"},
        overrides=("pretrain.train.max_tokens=1_000_000", "pretrain.train.eval_sequences=2"),
    )
    steps = plan(PipelineConfig(about="", steps={"data": data, "parent": parent}), [])
    started: list[str] = []
    listener = Listener(started=lambda name, *_: started.append(name), waiting=lambda _: None, finished=lambda *_: None)
    run = RunDirectory(root=tmp_path / "runs", name="short")
    context = StageContext(out=tmp_path, resume=tmp_path, pool=tmp_path, run_name="short", step_name="")
    message = (
        r"step parent on the data of step data, whose text ended after \d+ of data\.train_tokens=2000000: "
        r"pretrain\.train\.max_tokens=1000000 is beyond the data.* extend the text of data\.sources to 1003520$"
    )
    places = {"store": Store(run.store), "run": run, "context": context, "listener": listener}
    with run.held(), pytest.raises(ValueError, match=message):
        # A job of its own, as on Slurm: what waits for it must not start.
        run_step(steps, "data", **places) if is_single else run_steps(steps, **places)
    assert run.linked("data") is not None
    assert started == ["data"]
