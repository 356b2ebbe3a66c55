"""The pipeline ``fusion`` and the fusion ablation, with the stages as they are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from distill.config import RopeConfig
from fusion.group_table import FFNLatency, GroupScore, GroupTable, RemovalScore
from launch.config import PipelineConfig, compose_pipeline
from launch.pipeline import PlannedStep, plan
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTH = 256
TINY = [
    "engine.device=cpu",
    "data.train_tokens=4000",
    "data.validation_tokens=1000",
    "data.calibration_tokens=1000",
    "workload.prefill_tokens=8",
    "workload.generated_tokens=4",
    "workload.num_cpu_threads=1",
    *(
        f"{node}.{field}"
        for node in ("prune_attention", "dependency", "group_scores", "evaluate")
        for field in (
            "num_sequences=2",
            "seq_len=16",
        )
    ),
    "group_scores.num_widths=2",
    "group_scores.repeats=1",
    "group_scores.warmup=0",
    "benchmark.repeats=1",
    "benchmark.warmup=0",
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A directory that stands for the parent's checkpoint: plans look at its content alone."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    return f"model.source={tmp_path / 'source'}"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fusion_tables")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fusion_ablation")


def planned(*overrides: str) -> dict[str, PlannedStep]:
    return {step.name: step for step in plan(compose_pipeline("fusion", overrides), overrides)}


def test_pipeline_fuses_by_gain_and_distils_locally_then_globally(source: str) -> None:
    steps = planned(source, "fuse.max_kld=0.05")
    assert steps["fused"].config.fuse.choose == "most_gain"
    # Every stage that reads the node takes the bound.
    assert steps["fused"].config.fuse.max_kld == steps["locally_distilled"].config.fuse.max_kld == 0.05
    assert steps["fused"].inputs == {"model": "pruned", "dependency": "dependency", "group_scores": "group_scores"}
    # The stages that look at the unfused model look at one and the same.
    assert {steps[name].inputs["model"] for name in ("dependency", "group_scores", "fused")} == {"pruned"}
    assert steps["locally_distilled"].inputs == {"model": "pruned", "fused": "fused", "data": "data"}
    assert steps["distilled"].inputs["student"] == "locally_distilled"


def test_a_step_of_the_paper_replaces_the_choice_and_scores_follow_the_norm(source: str) -> None:
    steps = planned(source, "fuse=step_2", "fuse.norm=last")
    fuse = steps["fused"].config.fuse
    assert (fuse.choose, fuse.group_size, fuse.norm) == ("fewest_blocks", 4, "last")
    assert steps["group_scores"].config.group_scores.norm == "last"


def child_architecture(runs: tuple[tuple[int, int], ...], num_blocks: int = 14) -> Architecture:
    free = {index for first, last in runs for index in range(first, last + 1)}
    return Architecture(
        vocab_size=64,
        hidden_dim=32,
        num_heads=4,
        head_dim=8,
        max_positions=128,
        rope=RopeConfig(theta=10_000.0),
        blocks=tuple(
            BlockConfig(
                attention=NO_ATTENTION if index in free else AttentionConfig(num_kv_heads=2),
                ffn=FFNConfig(ffn_dim=WIDTH),
                parent_block_indices=(index,),
            )
            for index in range(num_blocks)
        ),
    )


def scores(runs: tuple[tuple[int, int], ...]) -> GroupTable:
    groups = [(first, last) for start, end in runs for first in range(start, end) for last in range(first + 1, end + 1)]
    return GroupTable(
        num_tokens=32,
        norm="folded",
        lm_loss=4.0,
        groups=tuple(
            GroupScore(
                first=a, last=b, ffn_dim=WIDTH * (b - a + 1), kld=0.01 * (b - a) ** 2, kld_stderr=0.001, lm_loss=4.1
            )
            for a, b in groups
        ),
        removals=tuple(
            RemovalScore(block=index, kld=0.1, kld_stderr=0.01, lm_loss=4.2)
            for first, last in runs
            for index in range(first, last + 1)
        ),
        latencies=tuple(
            FFNLatency(ffn_dim=WIDTH * n, prefill_ms=1.0 + n, decode_ms=0.1 + 0.01 * n) for n in range(1, 12)
        ),
        hardware="none",
        workload=vars(WorkloadConfig()),
    )


def test_every_step_of_the_ablation_is_one_that_the_stages_take(tables: ModuleType, source: str) -> None:
    runs = ((2, 7), (9, 12))
    child = tables.new_child(
        child_architecture(runs), scores(runs), [source], local_tokens=1_000_000, distill_tokens=2_000_000
    )
    # 5 + 3 FFNs without the last ones: pairs, then whole runs, which steps 3 and 4 only repeat.
    assert child.fusions == {"step_1": ((2, 4), (5, 6), (9, 11)), "step_2": ((2, 6), (9, 11))}
    assert child.labels == {"step_1": "step 1", "step_2": "step 2, 3, 4"}
    steps = tables.base_steps(num_attentions=10, choice="contiguous", child_tokens=1_000_000)
    found = [make(child) for make in tables.TABLES.values()]
    for table in found:
        steps |= table.steps
    names = {step.name for step in plan(PipelineConfig(about="ablation", steps=steps), [source])}
    assert {step for table in found for step in table.rows.values()} <= names


def test_gain_is_sought_within_the_kld_of_the_paper_s_step(tables: ModuleType, source: str) -> None:
    runs = ((2, 7),)
    child = tables.new_child(child_architecture(runs), scores(runs), [source], local_tokens=1, distill_tokens=1)
    bounds = [step.overrides[-1] for step in tables.most_gain(child).steps.values()]
    # (2, 4) and (5, 6), then (2, 6), of the made-up 0.01 (members - 1)^2 nats.
    assert [float(bound.removeprefix("fuse.max_kld=")) for bound in bounds] == pytest.approx([0.05, 0.16])


def test_without_group_scores_the_tables_that_need_them_are_empty(tables: ModuleType, source: str) -> None:
    child = tables.new_child(child_architecture(((2, 7),)), None, [source], local_tokens=1, distill_tokens=1)
    assert tables.removal(child).rows == tables.most_gain(child).rows == {"unfused": "child"}
    assert "group_scores" not in tables.fusion_steps(child).steps["step_1"].inputs


def test_ablation_writes_a_table_and_says_what_was_refused(
    program: ModuleType, pico_parent_dir: Path, tmp_path: Path
) -> None:
    kept = ("steps", "windows")
    overrides = [*TINY, f"model.source={pico_parent_dir}"]
    options = SimpleNamespace(
        num_attentions=3,
        choice="contiguous",
        child_tokens=0,
        local_tokens=1,
        distill_tokens=1,
        skip=[name for name in program.TABLES if name not in kept],
        set=overrides,
        out=tmp_path / "out",
    )
    bench = program.Workbench(tmp_path / "runs", "fusion_ablation", overrides)
    with bench.directory.held():
        assert program.ablation(bench, options)
    written = json.loads((tmp_path / "out" / "fusion_ablation.json").read_text())
    unfused, fused = written["tables"]["steps"]["rows"]
    assert (unfused["depth"], fused["depth"]) == (4, 3)
    assert fused["label"] == "step 1, 2, 3, 4: 2 FFNs to 1 (1-2)"
    assert fused["kld"] != unfused["kld"]
    assert fused["summed_kld"] > 0
    assert fused["decode_ms"] > 0
    parent, window = written["tables"]["windows"]["rows"]
    assert (parent["kld"], parent["depth"], window["depth"]) == (0.0, 4, 1)
    assert window["kld"] > 0
    assert list(written["tables"]["windows"]["missing"]) == ["2 windows", "3 windows", "4 windows"]
    assert "- 2 windows: parallelize.num_windows=2" in (tmp_path / "out" / "fusion_ablation.md").read_text()
