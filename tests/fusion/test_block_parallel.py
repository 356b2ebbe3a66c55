"""The greedy choice of windows, and the stage with what comes before and after it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config import EngineConfig, EvaluateConfig, ObjectiveConfig, OptimConfig, TrainConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion.block_parallel import choose_windows, parallel_architecture
from fusion.config import DependencyConfig, FuseConfig, ParallelizeConfig
from launch.stage import StageContext
from launch.stage_configs import (
    BenchmarkStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    FuseStage,
    MeasureCostsStage,
    MeasureDependencyStage,
    ParallelizeBlocksStage,
)
from launch.stages import (
    benchmark,
    distill,
    evaluate,
    export,
    fuse,
    measure_costs,
    measure_dependency,
    parallelize_blocks,
)
from puzzle.config import BenchmarkConfig, CostConfig, SpaceConfig, WorkloadConfig
from puzzle.model.checkpoint import TensorReader, copy_tokenizer, load_model, read_architecture
from puzzle.model.config import ExportConfig

A = (2, 256)
FFN = (None, 256)
NO_FFN = (2, None)
IDENTITY = (None, None)
ENGINE = EngineConfig(device="cpu")
SEQ_LEN = 16


def matrix_of(num_blocks, distance):
    """Distances above the diagonal, null elsewhere."""
    return [[distance(i, j) if i < j else None for j in range(num_blocks)] for i in range(num_blocks)]


def spans(windows):
    return [window.span for window in windows]


def config(num_windows=1, window_size=2, **fields):
    return ParallelizeConfig(num_windows=num_windows, window_size=window_size, **fields)


def test_smallest_largest_dependency_wins_then_smallest_sum(make_architecture):
    # Largest and sum of 0-2, 1-3, ...: 0.3/0.5, 0.9/1.1, 0.3/0.6, 0.3/0.7, 0.3/0.8.
    values = {(0, 1): 0.3, (1, 3): 0.9, (2, 4): 0.2, (3, 4): 0.3, (4, 5): 0.3, (4, 6): 0.2, (5, 6): 0.3}
    matrix = matrix_of(7, lambda i, j: values.get((i, j), 0.1))
    windows = choose_windows(make_architecture(*[A] * 7), config(2, 3), matrix)
    # What is left beside 0-2 ties at 0.3.
    assert spans(windows) == [(0, 2), (3, 5)]


def greedy_by_the_paper(matrix, free, size, num_windows):
    """Appendix B word by word: i* = argmin M_max, ties by M_sum, drop what overlaps, repeat."""
    starts = [i for i in range(len(matrix) - size + 1) if not free & set(range(i, i + size))]
    chosen = []
    while starts and len(chosen) < num_windows:
        square = {i: [matrix[a][b] for a, b in combinations(range(i, i + size), 2)] for i in starts}
        smallest = min(max(square[i]) for i in starts)
        tied = [i for i in starts if max(square[i]) == smallest]
        best = min(tied, key=lambda i: sum(square[i]))
        chosen.append((best, best + size - 1))
        starts = [i for i in starts if abs(i - best) >= size]
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_greedy_choice_is_the_papers(make_architecture, seed):
    generator = random.Random(seed)
    size, num_blocks = generator.choice([2, 3, 4]), 24
    free = set(generator.sample(range(num_blocks), 4))
    architecture = make_architecture(*[FFN if index in free else A for index in range(num_blocks)])
    # Few values: ties of the largest distance are the rule.
    matrix = matrix_of(num_blocks, lambda *_: generator.choice([0.1, 0.2, 0.3, 0.4]))
    expected = greedy_by_the_paper(matrix, free, size, 99)
    for num_windows in range(1, len(expected) + 1):
        windows = choose_windows(architecture, config(num_windows, size), matrix)
        assert spans(windows) == expected[:num_windows]
    with pytest.raises(ValueError, match=f"num_windows=99: the greedy choice finds {len(expected)} windows of"):
        choose_windows(architecture, config(99, size), matrix)


def test_window_tells_its_largest_and_summed_dependency(make_architecture):
    architecture = make_architecture(A, A, A, A)
    matrix = matrix_of(4, lambda i, j: {(0, 1): 0.5, (0, 2): 0.25, (1, 2): 0.125}.get((i, j), 1.0))
    (window,) = choose_windows(architecture, config(1, 3), matrix)
    assert (window.first, window.last, window.largest, window.total) == (0, 2, 0.5, 0.875)


def test_blocks_that_do_not_attend_and_windows_that_are_there_are_left_alone(make_architecture):
    architecture = make_architecture(A, A, FFN, A, NO_FFN, IDENTITY, A, A, A)
    matrix = matrix_of(9, lambda i, j: None if 5 in (i, j) else 0.1 * i)
    assert spans(choose_windows(architecture, config(3), matrix)) == [(0, 1), (3, 4), (6, 7)]
    taken = replace(architecture, parallel_windows=((0, 1),))
    windows = choose_windows(taken, config(2), matrix)
    assert spans(windows) == [(3, 4), (6, 7)]
    assert parallel_architecture(taken, windows).parallel_windows == ((0, 1), (3, 4), (6, 7))
    with pytest.raises(ValueError, match=r"finds 1 windows of parallelize.window_size=3 neighbouring blocks"):
        choose_windows(architecture, config(2, 3), matrix)


def test_windows_by_hand(make_architecture):
    architecture = make_architecture(A, A, A, A, A)
    windows = choose_windows(architecture, config(windows=((3, 4), (0, 2))), None)
    assert [(w.first, w.last, w.largest, w.total) for w in windows] == [(3, 4, None, None), (0, 2, None, None)]
    assert parallel_architecture(architecture, windows).parallel_windows == ((0, 2), (3, 4))
    (measured,) = choose_windows(architecture, config(windows=((1, 2),)), matrix_of(5, lambda i, j: 0.25 * i))
    assert (measured.largest, measured.total) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (((0, 1), (1, 2)), r"parallel windows \[0, 1\] and \[1, 2\] overlap"),
        (((2, 4),), r"parallel window \[2, 4\] has blocks without attention: 3; stage fuse"),
        (((4, 6),), r"parallel window \[4, 6\] must name at least two blocks within 0..5"),
        ((), r"parallelize.windows is empty"),
    ],
)
def test_windows_by_hand_that_cannot_be(make_architecture, windows, message):
    architecture = make_architecture(A, A, A, FFN, A, A)
    for matrix in (None, matrix_of(6, lambda i, j: 0.1)):
        with pytest.raises(ValueError, match=message):
            choose_windows(architecture, config(windows=windows), matrix)


def test_matrix_of_another_depth(make_architecture):
    with pytest.raises(ValueError, match="dependency matrix of 3 blocks for a model of 4 blocks"):
        choose_windows(make_architecture(A, A, A, A), config(), matrix_of(3, lambda i, j: 0.1))


# the stage


def context(out: Path) -> StageContext:
    out.mkdir()
    resume = out.parent / f"{out.name}.resume"
    resume.mkdir()
    return StageContext(out=out, resume=resume, pool=out.parent / "pool", run_name="test", step_name=out.name)


def artifact(path: Path, *, fingerprint: str = "a" * 64, model: str = "a" * 64) -> SimpleNamespace:
    manifest = SimpleNamespace(
        fingerprint=fingerprint, inputs={"model": SimpleNamespace(fingerprint=model)}, tokens={}, stage="test"
    )
    return SimpleNamespace(path=path, manifest=manifest)


@pytest.fixture
def parent(tmp_path, make_checkpoint, pico_parent_dir):
    """Six blocks that attend, two attention-free FFNs, a dummy, and two more that attend; in bf16, tied."""
    blocks = (*[A] * 6, FFN, FFN, IDENTITY, A, A)
    make_checkpoint(tmp_path / "parent", *blocks, vocab_size=320, tie_embeddings=True, dtype=torch.bfloat16)
    copy_tokenizer(pico_parent_dir, tmp_path / "parent")
    return artifact(tmp_path / "parent")


@pytest.fixture
def data(tmp_path, parent):
    directory = tmp_path / "data"
    directory.mkdir()
    for seed, name in enumerate(("train", "validation", "calibration")):
        tokens = np.random.default_rng(seed).integers(0, 320, 32 * SEQ_LEN).astype(np.uint16)
        np.save(directory / f"{name}.npy", tokens)
    summary = {
        "vocab_size": 320,
        "eos_token_id": 0,
        "unigram_entropy_nats": 5.0,
        "tokenizer_sha256": tokenizer_sha256(parent.path),
    }
    (directory / "data.json").write_text(json.dumps(summary))
    return artifact(directory)


DEPENDENCY = MeasureDependencyStage(
    dependency=DependencyConfig(num_sequences=6, seq_len=SEQ_LEN, batch_size=3), engine=ENGINE
)


def parallelized(tmp_path, parent, name="parallel", dependency=None, **fields):
    inputs = {"model": parent} | ({"dependency": dependency} if dependency else {})
    result = parallelize_blocks.run(
        ParallelizeBlocksStage(parallelize=ParallelizeConfig(**fields)), inputs, context(tmp_path / name)
    )
    return result, artifact(tmp_path / name, fingerprint="c" * 64)


def test_measured_chosen_and_written(tmp_path, parent, data):
    measure_dependency.run(DEPENDENCY, {"model": parent, "data": data}, context(tmp_path / "dependency"))
    matrix = json.loads((tmp_path / "dependency" / "dependency.json").read_text())["matrix"]
    result, parallel = parallelized(
        tmp_path, parent, dependency=artifact(tmp_path / "dependency"), num_windows=2, window_size=3
    )
    record = json.loads((parallel.path / "parallel.json").read_text())
    first, second = record["windows"]
    assert [(w["first"], w["last"]) for w in record["windows"]] == greedy_by_the_paper(matrix, {6, 7, 8}, 3, 2)
    square = [matrix[i][j] for i, j in combinations(range(first["first"], first["last"] + 1), 2)]
    assert (first["max"], first["sum"]) == (max(square), pytest.approx(sum(square)))
    assert record["max"] == max(first["max"], second["max"]) > 0
    assert record["sum"] == pytest.approx(first["sum"] + second["sum"])
    assert result.metrics == {"num_blocks": 11, "depth": 7, **record}
    assert result.headline.startswith(
        f"blocks {first['first']}-{first['last']}, {second['first']}-{second['last']} run"
    )
    assert result.headline.endswith("11 blocks in 7 steps one after another")

    assert read_architecture(parallel.path).parallel_windows == ((0, 2), (3, 5))
    with TensorReader(parent.path) as before, TensorReader(parallel.path) as after:
        assert after.names() == before.names()
        for name in before.names():
            assert after.dtype(name) == torch.bfloat16
            assert torch.equal(after.read(name), before.read(name))
    assert tokenizer_sha256(parallel.path) == tokenizer_sha256(parent.path)


def test_windows_by_hand_go_on_top_of_those_that_are_there(tmp_path, parent):
    _, once = parallelized(tmp_path, parent, windows=((0, 2),))
    result, twice = parallelized(tmp_path, once, name="twice", windows=((9, 10), (3, 4)))
    assert read_architecture(twice.path).parallel_windows == ((0, 2), (3, 4), (9, 10))
    assert result.headline == (
        "blocks 9-10, 3-4 run in parallel besides 1 that the model had; 11 blocks in 7 steps one after another"
    )
    record = json.loads((twice.path / "parallel.json").read_text())
    assert (record["max"], record["sum"]) == (None, None)


def test_parallel_model_is_evaluated_timed_and_distilled(tmp_path, parent, data):
    _, parallel = parallelized(tmp_path, parent, windows=((0, 3), (9, 10)))
    config = EvaluateStage(evaluate=EvaluateConfig(seq_len=SEQ_LEN, num_sequences=4), engine=ENGINE, seed=0)
    report = evaluate.run(
        config, {"parent": parent, "data": data, "parallel": parallel}, context(tmp_path / "evaluate")
    )
    before = report.metrics["models"]["parallel"]["kld"]
    assert before > 0.01

    times = benchmark.run(
        BenchmarkStage(
            benchmark=BenchmarkConfig(repeats=1, warmup=0),
            workload=WorkloadConfig(prefill_tokens=8, generated_tokens=4, num_cpu_threads=1),
            engine=ENGINE,
        ),
        {"parent": parent, "parallel": parallel},
        context(tmp_path / "benchmark"),
    )
    assert times.metrics["models"]["parallel"]["decode_ms"] > 0

    config = DistillStage(
        distill=TrainConfig(
            max_tokens=64 * SEQ_LEN, seq_len=SEQ_LEN, batch_size=8, eval_sequences=4, data_end="repeat"
        ),
        objective=ObjectiveConfig(kld=1.0, hidden_cosine=1.0, chunk_tokens=64),
        optim=OptimConfig(lr=1e-3),
        engine=ENGINE,
        seed=0,
    )
    distill.run(config, {"student": parallel, "teacher": parent, "data": data}, context(tmp_path / "distilled"))
    assert read_architecture(tmp_path / "distilled").parallel_windows == ((0, 3), (9, 10))
    curve = [json.loads(line) for line in (tmp_path / "distilled" / "metrics.jsonl").read_text().splitlines()]
    klds = [entry["eval/kld"] for entry in curve if "eval/kld" in entry]
    assert klds[-1] < klds[0]


def test_export_takes_windows_along_past_dropped_dummies(tmp_path, parent):
    _, parallel = parallelized(tmp_path, parent, windows=((0, 3), (9, 10)))
    stage = ExportStage(export=ExportConfig(targets=("transformers",)))
    export.run(stage, {"model": parallel}, context(tmp_path / "exported"))
    assert read_architecture(tmp_path / "exported").parallel_windows == ((0, 3), (8, 9))
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        logits = [load_model(path, dtype=torch.float32)(ids).logits for path in (parallel.path, tmp_path / "exported")]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match=r"vllm cannot load this model: .*blocks run in parallel windows"):
        export.run(ExportStage(export=ExportConfig(targets=("vllm",))), {"model": parallel}, context(tmp_path / "vllm"))
    assert list((tmp_path / "vllm").iterdir()) == []


def test_stages_that_go_block_by_block_refuse_the_model(tmp_path, parent, data):
    _, parallel = parallelized(tmp_path, parent, windows=((0, 3),))
    costs = MeasureCostsStage(
        space=SpaceConfig(), workload=WorkloadConfig(), costs=CostConfig(sources=("analytic",)), engine=ENGINE
    )
    refusals = {
        "dependency": lambda to: measure_dependency.run(DEPENDENCY, {"model": parallel, "data": data}, to),
        "costs": lambda to: measure_costs.run(costs, {"parent": parallel}, to),
        "fused": lambda to: fuse.run(FuseStage(fuse=FuseConfig(leave_last_out=False)), {"model": parallel}, to),
    }
    for name, refused in refusals.items():
        with pytest.raises(ValueError, match="one after another, and this model runs blocks 0-3 in parallel; give it"):
            refused(context(tmp_path / name))
        assert list((tmp_path / name).iterdir()) == []


def test_choice_without_a_measurement_or_by_another_models(tmp_path, parent):
    stage = ParallelizeBlocksStage(parallelize=ParallelizeConfig())
    with pytest.raises(ValueError, match="goes by the input `dependency`"):
        stage.check_inputs(["model"])
    stage.check_inputs(["model", "dependency"])
    with pytest.raises(ValueError, match="matrix was made from model bbbbbbbbbbbb, the model given is aaaaaaaaaaaa"):
        parallelized(tmp_path, parent, dependency=artifact(tmp_path, model="b" * 64))
    assert list((tmp_path / "parallel").iterdir()) == []


def test_refused_windows_leave_nothing(tmp_path, parent):
    with pytest.raises(ValueError, match=r"parallel window \[5, 6\] has blocks without attention: 6"):
        parallelized(tmp_path, parent, windows=((5, 6),))
    assert list((tmp_path / "parallel").iterdir()) == []


def quantise(tensors, name):
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"does not hold what its config.json describes: it lacks \["),
        (lambda tensors, name: tensors.update({name: tensors[name][:8].clone()}), r"is \[8, 32\], config.json says \["),
        (quantise, "is stored as F8_E4M3, not as one of"),
    ],
    ids=["missing", "another_shape", "quantised"],
)
def test_damaged_checkpoint_is_refused_before_anything_is_written(tmp_path, parent, damage, message):
    (file,) = parent.path.glob("*.safetensors")
    tensors = load_file(file)
    damage(tensors, "model.layers.10.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        parallelized(tmp_path, parent, windows=((0, 2),))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "parallel").iterdir()) == []


def test_cut_off_shard_and_missing_tokenizer_are_refused_before_anything_is_written(tmp_path, parent):
    (file,) = parent.path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"it has \d+ bytes, its header describes \d+"):
        parallelized(tmp_path, parent, name="cut_off", windows=((0, 2),))
    file.write_bytes(whole)
    (parent.path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer, and the result needs one"):
        parallelized(tmp_path, parent, name="no_tokenizer", windows=((0, 2),))
    assert list((tmp_path / "cut_off").iterdir()) == list((tmp_path / "no_tokenizer").iterdir()) == []
