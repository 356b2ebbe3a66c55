"""measure_costs and benchmark on a pico parent: sources, batch sizes, ranks, and the workload beside every figure."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import distributed, multiprocessing

from distill import distributed as processes
from distill.config import EngineConfig
from launch.config import CONF, compose_stage
from launch.stage import StageContext
from launch.stage_configs import BenchmarkStage, MeasureCostsStage
from launch.stages import benchmark, measure_costs
from puzzle import calibrate
from puzzle.config import BenchmarkConfig, CostConfig, HardwareConfig, SpaceConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.checkpoint import build_model, save_model
from puzzle.tables import CostFile

WORKLOAD = WorkloadConfig(prefill_tokens=16, generated_tokens=8)
DEVICE = HardwareConfig(
    name="a GPU",
    flops_per_s=1e12,
    bytes_per_s=1e11,
    kernel_launch_s=1e-6,
    all_reduce_s=1e-5,
    all_reduce_bytes_per_s=1e10,
)
BOTH = CostConfig(repeats=1, warmup=0)
ANALYTIC = CostConfig(sources=("analytic",), hardware=DEVICE)


def artifact(path: Path) -> SimpleNamespace:
    return SimpleNamespace(path=path)


@pytest.fixture
def context(tmp_path):
    (tmp_path / "out").mkdir()
    return StageContext(
        out=tmp_path / "out",
        resume=tmp_path / "resume",
        pool=tmp_path / "pool",
        run_name="test",
        step_name="costs",
    )


@pytest.fixture
def measure(context, pico_parent_dir):
    def run(costs, workload=WORKLOAD, *, parent=pico_parent_dir):
        config = MeasureCostsStage(
            space=SpaceConfig(ffn_fracs=(0.5,)), workload=workload, costs=costs, engine=EngineConfig(device="cpu")
        )
        result = measure_costs.run(config, {"parent": artifact(parent)}, context)
        return CostFile.read(context.out / "costs.json"), result, context.out

    return run


def test_both_sources_at_every_batch_size(measure):
    file, result, directory = measure(replace(BOTH, batch_sizes=(4, 1)))
    assert [(table.source, table.workload.batch_size) for table in file.tables] == [
        ("measured", 1),
        ("measured", 4),
        ("analytic", 1),
        ("analytic", 4),
    ]
    assert {table.hardware for table in file.tables} == {result.metrics["hardware"]["name"]}
    assert {table.all_reduce for table in file.tables} == {None}
    with (directory / "comparison.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    # kv2, w512 and w256, and what is outside of the blocks, in two phases at two batch sizes.
    assert len(rows) == 4 * 2 * 2
    assert result.metrics["analytic_median_relative_difference"]["decode"] >= 0
    assert result.metrics["hardware"]["bytes_per_s"] > 0
    assert json.dumps(result.metrics, allow_nan=False)


def test_every_figure_of_the_headline_names_its_workload(measure):
    _, result, _ = measure(BOTH, replace(WORKLOAD, batch_size=2))
    assert result.headline.startswith("decode ")
    assert ", batch 2, prompt of 16 tokens, 8 generated, float32), attention " in result.headline
    assert "; analytic off by " in result.headline
    assert result.metrics["workload"]["batch_size"] == 2


def test_a_named_device_is_computed_without_touching_this_one(measure, monkeypatch):
    for name in ("resolve_device", "hardware", "calibrate", "measured_table"):
        monkeypatch.setattr(measure_costs, name, None)
    file, result, directory = measure(ANALYTIC)
    assert [(table.source, table.hardware) for table in file.tables] == [("analytic", "a GPU")]
    assert "(analytic, a GPU, batch 1, " in result.headline
    assert not (directory / "comparison.csv").exists()


def test_costs_of_one_of_two_ranks(measure, pico_architecture):
    whole, _, _ = measure(ANALYTIC)
    half, result, _ = measure(ANALYTIC, replace(WORKLOAD, tensor_parallel=2))
    table = half.tables[0]
    assert table.hardware == "2 x a GPU"
    assert "2 tensor-parallel ranks" in result.headline
    ffn, whole_ffn = (t.subblock("ffn", "w512") for t in (table, whole.tables[0]))
    assert ffn.params == whole_ffn.params
    assert ffn.weight_bytes == 4 * (3 * 64 * 256 + 64)
    total = table.model(block.name for block in pico_architecture.blocks)
    assert total.params == stats.num_params(pico_architecture)


def test_the_all_reduce_of_measured_ranks_may_be_modelled(measure):
    costs = replace(BOTH, sources=("measured",), hardware=replace(DEVICE, all_reduce_s=1.0))
    file, result, _ = measure(costs, replace(WORKLOAD, tensor_parallel=2))
    table = file.tables[0]
    assert table.all_reduce == result.metrics["all_reduce"] == "modelled"
    assert "2 tensor-parallel ranks, all-reduce modelled)" in result.headline
    # A second for each all-reduce, far above all that is measured here, and its noise.
    assert all(0.5e3 < row.decode_ms < 1.5e3 for row in table.subblocks if row.variant != "no_op")
    assert 0.5e3 < table.ffn_merge_saving.decode_ms < 1.5e3
    assert 1.5e3 < table.overhead.decode_ms < 2.5e3


def test_bad_ranks(measure):
    with pytest.raises(ValueError, match=r"workload.tensor_parallel=3 does not divide the 4 query heads"):
        measure(BOTH, replace(WORKLOAD, tensor_parallel=3))
    with pytest.raises(ValueError, match=r"all_reduce_s, all_reduce_bytes_per_s .*is null; .*start 2 processes"):
        measure(BOTH, replace(WORKLOAD, tensor_parallel=2))


def _measure_in(rank: int, directory: Path, parent: Path) -> None:
    init_method = f"file://{directory / 'init'}"
    distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
    calibrate.LARGE_REDUCTION_BYTES = 2**20
    config = MeasureCostsStage(
        space=SpaceConfig(),
        workload=replace(WORKLOAD, dtype="bfloat16", tensor_parallel=2, num_cpu_threads=1),
        costs=replace(BOTH, batch_sizes=(2,)),
        engine=EngineConfig(device="cpu"),
    )
    context = StageContext(out=directory, resume=directory, pool=directory, run_name="test", step_name="costs")
    with processes.together():
        result = measure_costs.run(config, {"parent": artifact(parent)}, context)
    (directory / f"{rank}.json").write_text(json.dumps(result.metrics))
    processes.leave()


def test_two_processes_measure_their_all_reduces_together(tmp_path, pico_parent_dir):
    multiprocessing.spawn(_measure_in, args=(tmp_path, pico_parent_dir), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second == {}
    assert first["hardware"]["all_reduce_s"] > 0
    assert first["hardware"]["all_reduce_bytes_per_s"] > 0
    tables = CostFile.read(tmp_path / "costs.json").tables
    assert [(table.source, table.workload.batch_size) for table in tables] == [
        ("measured", 1),
        ("measured", 2),
        ("analytic", 1),
        ("analytic", 2),
    ]
    assert [table.all_reduce for table in tables] == ["measured", "measured", "modelled", "modelled"]
    # A clamped time would be 0: what stands there is then the all-reduce alone.
    assert all(row.decode_ms > 0 for table in tables for row in table.subblocks if row.variant != "no_op")


def test_memory_counts_what_a_server_would_hold(measure, pico_architecture, pico_parent_dir, tmp_path):
    """Tied embeddings once, the model's own head dimension, no cache beyond the sliding window."""
    architecture = replace(pico_architecture, tie_embeddings=True, head_dim=32, sliding_window=8)
    save_model(
        build_model(architecture, seed=0), tmp_path / "tied", architecture=architecture, tokenizer_from=pico_parent_dir
    )
    _, result, _ = measure(ANALYTIC, replace(WORKLOAD, batch_size=3), parent=tmp_path / "tied")
    block_values = 2 * 64 + 64 * 32 * (4 + 2 + 2 + 4) + 3 * 64 * 512
    weights = 320 * 64 + 64 + 4 * block_values
    cached = 3 * 8 * 4 * 2 * 2 * 32
    assert result.metrics["parent_memory_bytes"] == 4 * (weights + cached)


def test_vllm_is_asked_only_where_it_is_a_source(measure, monkeypatch):
    file, _, _ = measure(ANALYTIC)
    seen = []

    def vllm_table(parent, subblocks, *, workload, config, hardware):
        seen.append((workload.batch_size, hardware))
        return replace(file.tables[0], source="vllm", workload=workload, hardware=hardware)

    fake = ModuleType("puzzle.vllm_costs")
    fake.vllm_table = vllm_table
    fake.require_vllm = lambda parent, subblocks, *, workload: None
    monkeypatch.setitem(sys.modules, "puzzle.vllm_costs", fake)
    file, result, _ = measure(replace(ANALYTIC, sources=("vllm", "analytic"), batch_sizes=(2,)))
    assert [size for size, _ in seen] == [1, 2]
    assert file.sources == ("vllm", "analytic")
    assert result.headline.startswith("decode ")
    assert "(vllm, " in result.headline


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "hardware").glob("*.yaml")))
def test_shipped_hardware_gives_every_rate_or_calibrates_all(name):
    config = compose_stage(MeasureCostsStage, [f"hardware@costs.hardware={name}"])
    values = vars(config.costs.hardware).values()
    assert all(value is None for value in values) if name == "here" else None not in values


def test_benchmark_names_its_workload(context, pico_parent_dir, pico_architecture):
    config = BenchmarkStage(
        benchmark=BenchmarkConfig(repeats=1, warmup=0),
        workload=replace(WORKLOAD, batch_size=2),
        engine=EngineConfig(device="cpu"),
    )
    inputs = {"parent": artifact(pico_parent_dir), "same": artifact(pico_parent_dir)}
    result = benchmark.run(config, inputs, context)
    assert "batch 2, prompt of 16 tokens, 8 generated, float32" in result.headline
    expected = stats.weight_bytes(pico_architecture, 4) + 2 * 24 * stats.kv_bytes_per_token(pico_architecture, 4)
    assert result.metrics["models"]["parent"]["memory_bytes"] == expected
    with pytest.raises(ValueError, match=r"workload.tensor_parallel=2: the benchmark runs whole models on one device"):
        benchmark.run(replace(config, workload=replace(WORKLOAD, tensor_parallel=2)), inputs, context)
