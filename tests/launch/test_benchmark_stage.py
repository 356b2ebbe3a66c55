"""The stage benchmark on whole pico models, and workloads that are too long for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.config import EngineConfig
from launch.stage import StageContext
from launch.stage_configs import BenchmarkStage, MeasureCostsStage
from launch.stages import benchmark, measure_costs
from puzzle.config import BenchmarkConfig, CostConfig, SpaceConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import build_model, save_model

ENGINE = EngineConfig(device="cpu")
WORKLOAD = WorkloadConfig(prefill_tokens=16, generated_tokens=8)


def artifact(path: Path) -> SimpleNamespace:
    return SimpleNamespace(path=path)


@pytest.fixture
def context(tmp_path):
    (tmp_path / "out").mkdir()
    return StageContext(
        out=tmp_path / "out", resume=tmp_path / "resume", pool=tmp_path / "pool", run_name="test", step_name="step"
    )


@pytest.fixture
def models(tmp_path, pico_parent_dir, pico_architecture):
    blocks = tuple(replace(block, attention=NO_ATTENTION) for block in pico_architecture.blocks)
    child = pico_architecture.with_blocks((pico_architecture.blocks[0], *blocks[1:]))
    save_model(build_model(child, seed=1), tmp_path / "child", architecture=child, tokenizer_from=None)
    return {"child": artifact(tmp_path / "child"), "parent": artifact(pico_parent_dir)}


def test_benchmark_compares_whole_models(context, models, pico_architecture):
    config = BenchmarkStage(
        benchmark=BenchmarkConfig(repeats=3, warmup=0), workload=replace(WORKLOAD, num_cpu_threads=1), engine=ENGINE
    )
    result = benchmark.run(config, models, context)
    report = json.loads((context.out / "benchmark.json").read_text())
    assert list(report["models"]) == ["parent", "child"]
    parent, child = report["models"]["parent"], report["models"]["child"]
    assert (parent["decode_vs_parent"], parent["prefill_vs_parent"]) == (1.0, 1.0)
    assert child["kv_bytes_per_token"] * 4 == parent["kv_bytes_per_token"]
    assert parent["weight_bytes"] == stats.weight_bytes(pico_architecture, 4)
    assert child["weight_bytes"] < parent["weight_bytes"]
    assert parent["decode_tokens_per_s"] == pytest.approx(1e3 / parent["decode_ms"])
    assert parent["request_ms"] == pytest.approx(parent["prefill_ms"] + 7 * parent["decode_ms"])
    assert parent["peak_memory_bytes"] is None
    assert report["workload"]["generated_tokens"] == 8
    assert report["cpu_threads"] == 1
    assert all(len(report["rounds_ms"][phase][name]) == 3 for phase in ("prefill", "decode") for name in models)
    assert "ms parent, child " in result.headline
    assert ("noisy" in result.headline) == any(
        report["models"][name][f"{phase}_spread"] > 0.25 for name in models for phase in ("prefill", "decode")
    )


def test_benchmark_beyond_the_positions(context, models):
    workload = WorkloadConfig(prefill_tokens=256, generated_tokens=1)
    config = BenchmarkStage(benchmark=BenchmarkConfig(), workload=workload, engine=ENGINE)
    with pytest.raises(ValueError, match="256 positions of parent"):
        benchmark.run(config, models, context)


def test_costs_beyond_the_positions(context, pico_parent_dir):
    workload = WorkloadConfig(prefill_tokens=250, generated_tokens=7)
    config = MeasureCostsStage(space=SpaceConfig(), workload=workload, costs=CostConfig(), engine=ENGINE)
    with pytest.raises(ValueError, match="256 positions of parent"):
        measure_costs.run(config, {"parent": artifact(pico_parent_dir)}, context)
