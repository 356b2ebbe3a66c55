"""measure_costs, search and benchmark on a pico parent, each reading what the one before wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.config import EngineConfig
from fusion.config import FuseConfig
from launch.registry import BenchmarkStage, MeasureCostsStage, SearchStage
from launch.stage import StageContext
from launch.stages import benchmark, measure_costs, search
from puzzle.config import BenchmarkConfig, ConstraintConfig, CostConfig, SearchConfig, SpaceConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.hf_config import architecture_from_config
from puzzle.space import block_variants
from puzzle.tables import CostFile, ScoreRow, ScoreTable

ENGINE = EngineConfig(device="cpu")
SPACE = SpaceConfig(ffn_fracs=(0.5,))
WORKLOAD = WorkloadConfig(prefill_tokens=16, generated_tokens=8)
COSTS = MeasureCostsStage(space=SPACE, workload=WORKLOAD, costs=CostConfig(repeats=1, warmup=0), engine=ENGINE)


def artifact(path: Path, *, parent: str = "a" * 64) -> SimpleNamespace:
    manifest = SimpleNamespace(inputs={"parent": SimpleNamespace(fingerprint=parent)})
    return SimpleNamespace(path=path, manifest=manifest)


@pytest.fixture
def context(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return StageContext(out=tmp_path / name, resume=tmp_path / "resume", run_name="test", step_name=name)

    return make


@pytest.fixture(scope="module")
def measured(tmp_path_factory, pico_parent_dir):
    directory = tmp_path_factory.mktemp("costs")
    stage = StageContext(out=directory, resume=directory / "resume", run_name="test", step_name="costs")
    return directory, measure_costs.run(COSTS, {"parent": artifact(pico_parent_dir)}, stage)


@pytest.fixture
def scores(tmp_path, pico_architecture):
    """Attentions are cheaper to remove towards the end; half an FFN costs more than any attention."""
    rows = []
    for index, own in enumerate(pico_architecture.blocks):
        for variant in block_variants(pico_architecture, index, SPACE):
            kld = 0.1 * (4 - index) * (variant.attention != own.attention) + 1.0 * (variant.ffn != own.ffn)
            row = ScoreRow(block=index, variant=variant.name, kld=kld, lm_loss=-kld, hidden_cosine=0.0, kld_stderr=0.0)
            rows.append(row)
    (tmp_path / "scores").mkdir()
    table = ScoreTable(parent={"lm_loss": 2.0}, num_tokens=64, rows=tuple(rows))
    table.write(tmp_path / "scores" / "scores.json")
    return tmp_path / "scores"


@pytest.fixture
def costs(tmp_path, measured):
    """The measured costs, with times that do not depend on this machine: 1 ms per attention, 3 per FFN."""
    file = CostFile.read(measured[0] / "costs.json")
    times_ms = {"kv2": 1.0, "w512": 3.0, "w256": 2.0, "no_op": 0.0}
    table = file.tables["measured"]
    rows = tuple(replace(row, decode_ms=times_ms[row.variant]) for row in table.subblocks)
    overhead, saving = replace(table.overhead, decode_ms=0.5), replace(table.ffn_merge_saving, decode_ms=0.25)
    table = replace(table, subblocks=rows, overhead=overhead, ffn_merge_saving=saving)
    (tmp_path / "times").mkdir()
    replace(file, tables={"measured": table}).write(tmp_path / "times" / "costs.json")
    return tmp_path / "times"


def run_search(context, scores, costs, **fields):
    settings = SearchConfig(**{"constraint": ConstraintConfig(latency_ms=14.3), **fields})
    config = SearchStage(search=settings, fuse=FuseConfig())
    result = search.run(config, {"scores": artifact(scores), "costs": artifact(costs)}, context)
    return result, json.loads((context.out / "solution.json").read_text())


def test_costs_of_the_parent(measured, pico_architecture):
    directory, result = measured
    file = CostFile.read(directory / "costs.json")
    assert set(file.tables) == {"measured", "analytic"}
    assert architecture_from_config(file.architecture) == pico_architecture
    assert file.workload == WORKLOAD
    for table in file.tables.values():
        total = table.model(block.name for block in pico_architecture.blocks)
        assert total.params == stats.num_params(pico_architecture)
        assert total.memory_bytes == stats.weight_bytes(pico_architecture, 4) + 24 * total.kv_bytes_per_token
    assert "ms parent (measured), attention " in result.headline
    assert 0 <= result.metrics["attention_decode_frac"] <= 1
    assert result.metrics["analytic_median_relative_difference"]["decode"] >= 0
    assert json.dumps(result.metrics, allow_nan=False)


def test_costs_beyond_the_positions(context, pico_parent_dir):
    config = replace(COSTS, workload=WorkloadConfig(prefill_tokens=250, generated_tokens=7))
    with pytest.raises(ValueError, match="256 positions of parent"):
        measure_costs.run(config, {"parent": artifact(pico_parent_dir)}, context("costs"))


def test_search_removes_the_cheapest_run(context, scores, costs):
    """The parent takes 16.5 ms; without attention in the last three blocks 13.5, and 13.25 after one merge."""
    constraint = ConstraintConfig(latency_ms=13.3)
    result, content = run_search(context("search"), scores, costs, constraint=constraint)
    best = content["solutions"][0]
    assert best["blocks"] == ["kv2+w512", "no_op+w512", "no_op+w512", "no_op+w512"]
    assert best["score"] == pytest.approx(0.6)
    assert (best["parent_costs"]["latency_ms"], best["costs"]["latency_ms"]) == (16.5, 13.5)
    assert (best["predicted_fused_latency_ms"], best["num_merges"]) == (13.25, 1)
    assert (best["status"], content["metric"], content["workload"]["prefill_tokens"]) == ("optimal", "kld", 16)
    assert best["costs"].keys() >= {"memory_bytes", "params", "kv_bytes_per_token"}
    assert result.headline == "3 of 4 attentions removed, predicted decode 0.82x (fused 0.80x), score 0.6"


def test_search_front_and_several_solutions(context, scores, costs):
    result, content = run_search(
        context("search"), scores, costs, num_solutions=30, pareto_latency_fracs=(0.9, 0.1, 1.0), min_different_frac=0.5
    )
    assert [point["latency_frac"] for point in content["pareto"]] == [0.9, 1.0]
    assert content["pareto"][1]["score"] == 0
    assert content["pareto"][0]["score"] > 0
    assert content["pareto_out_of_reach"] == [0.1]
    assert 1 < len(content["solutions"]) < 30
    assert f"{len(content['solutions'])} of 30 solutions" in result.headline


def test_search_by_another_metric(context, scores, costs):
    """Where the loss falls with every change, all is changed."""
    _, content = run_search(context("search"), scores, costs, metric="lm_loss", constraint=ConstraintConfig())
    assert content["solutions"][0]["blocks"] == ["kv2+w256", *["no_op+w256"] * 3]


def test_search_without_the_table(context, scores, costs):
    with pytest.raises(ValueError, match=r"cost_table=analytic is not in costs.json, which has measured"):
        run_search(context("search"), scores, costs, cost_table="analytic")


def test_search_with_a_variant_that_was_not_measured(context, scores, costs):
    path = costs / "costs.json"
    content = json.loads(path.read_text())
    rows = content["tables"]["measured"]["subblocks"]
    content["tables"]["measured"]["subblocks"] = [row for row in rows if row["variant"] != "w256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ffn variant w256 is not in the table, which has w512"):
        run_search(context("search"), scores, costs)


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
    stage = context("benchmark")
    result = benchmark.run(config, models, stage)
    report = json.loads((stage.out / "benchmark.json").read_text())
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
        benchmark.run(config, models, context("benchmark"))


def test_scores_and_costs_of_different_parents_are_refused(context, scores, measured):
    config = SearchStage(search=SearchConfig(constraint=ConstraintConfig(latency_ms=14.3)), fuse=FuseConfig())
    inputs = {"scores": artifact(scores), "costs": artifact(measured[0], parent="b" * 64)}
    with pytest.raises(ValueError, match="scores are of model aaaaaaaaaaaa, the costs of model bbbbbbbbbbbb"):
        search.run(config, inputs, context("search"))


@pytest.mark.parametrize("setting", [{"max_ffn_dim": 512}, {"min_length": 3}, {"max_dependency": 0.1}])
def test_fusion_that_the_cost_does_not_model_is_refused(context, scores, measured, setting):
    config = SearchStage(search=SearchConfig(constraint=ConstraintConfig(latency_ms=14.3)), fuse=FuseConfig(**setting))
    inputs = {"scores": artifact(scores), "costs": artifact(measured[0])}
    with pytest.raises(ValueError, match=f"fuse.{next(iter(setting))}=.* is not in the search's fusion-aware cost"):
        search.run(config, inputs, context("search"))
