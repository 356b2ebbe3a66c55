"""What the benchmarks of training count and how they search, without a GPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model
from puzzle.model.stats import flops_per_token, num_params

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "objective"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def throughput(load: Load) -> ModuleType:
    return load("kd_throughput")


def test_flops_of_a_step_are_those_that_torch_counts(throughput: ModuleType) -> None:
    student, teacher = throughput.shapes("pico")
    seq_len, sequences = 64, 3
    tokens = torch.zeros(sequences, seq_len, dtype=torch.long)
    # Attention as plain products over the whole square, which the counter knows.
    models = [build_model(shape, seed=0) for shape in (teacher, student)]
    for model in models:
        model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            models[0](input_ids=tokens, use_cache=False)
        models[1](input_ids=tokens, use_cache=False).logits.sum().backward()

    def square(architecture: Architecture) -> float:
        """Scores and sums of values of one forward, over all pairs of positions."""
        pairs = sequences * seq_len**2
        return 4.0 * pairs * architecture.num_heads * architecture.head_dim * architecture.num_blocks

    # Causal attention has seq_len (seq_len + 1) / 2 pairs; the rest of the square is no model FLOPs.
    unseen = (square(teacher) + 3 * square(student)) * (1 - (seq_len + 1) / (2 * seq_len))
    counted = throughput.flops_per_step(student, teacher, seq_len=seq_len, sequences=sequences)
    assert counted == counter.get_total_flops() - unseen


def test_flops_of_a_step_are_the_sum_over_positions(throughput: ModuleType) -> None:
    student, teacher = throughput.shapes("1b_3b")
    positions = range(1, 8)
    expected = sum(flops_per_token(teacher, n) + 3 * flops_per_token(student, n) for n in positions)
    assert throughput.flops_per_step(student, teacher, seq_len=7, sequences=2) == 2 * expected


@pytest.mark.parametrize(
    ("device", "precision", "has_peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True),
        ("NVIDIA H200", "bf16", True),
        ("NVIDIA H100 PCIe", "bf16", False),
        ("NVIDIA H100 NVL", "bf16", False),
        ("NVIDIA GH200 480GB", "bf16", False),
        ("NVIDIA H100 80GB HBM3", "fp32", False),
    ],
)
def test_mfu_is_of_a_known_peak_or_left_out_with_a_note(
    throughput: ModuleType, device: str, precision: str, has_peak: bool
) -> None:
    outcome = throughput.Outcome(step_s=(1.0,), losses=(2.0,), device=device)
    row = throughput.make_row(
        "torch", 1, outcome, flops=98.94e12, tokens=10, engine=throughput.EngineConfig(precision=precision)
    )
    text = throughput.markdown([row], {"precision": precision})
    assert row.mfu_frac == (pytest.approx(0.1) if has_peak else None)
    assert (f"No MFU: no dense peak in {precision} is known of {device}." in text) != has_peak


def test_dense_shape_is_llama_8b_and_results_name_the_shape(load: Load, tmp_path: Path) -> None:
    program, trials = load("longest_sequence"), load("training_trials")
    dense = program.architecture("8b")
    # Of Llama-3.1-8B's configuration.
    assert num_params(dense) == 8_030_261_248
    assert (dense.num_blocks, sum(not block.attention.is_no_op for block in dense.blocks)) == (32, 32)
    trials.write_random_model(tmp_path / "pico", program.architecture("pico"))
    assert trials.shape_text(tmp_path / "pico").endswith("M parameters, 3 blocks, 2 attentions")
    assert "8b" in program.PUBLISHED
    assert "8b_child" not in program.PUBLISHED


def _tries(program: ModuleType, tokens_and_gb: dict[int, float], *, failed: int | None = None) -> list[Any]:
    """Trained lengths with what the GPU's allocator held, and one that ran out of memory."""
    rest = {"variant": "tiled", "gpus": 1, "gpu_peak_gb": 0.0, "gpu_planned_gb": 0.0}
    rest |= {"host_taken_gb": 97.0, "host_resident_gb": 96.0}
    passed = [
        program.Try(tokens=tokens, gpu_reserved_gb=gb, failure=None, step_s=1.0, device="H100", **rest)
        for tokens, gb in tokens_and_gb.items()
    ]
    if failed is None:
        return passed
    return [
        *passed,
        program.Try(tokens=failed, gpu_reserved_gb=85.0, failure="GPU memory", step_s=None, device="", **rest),
    ]


def test_the_next_length_is_where_memory_ends(load: Load) -> None:
    program = load("longest_sequence")
    options = {"start": 32_768, "granularity": 8192, "gpu_gb": 85.0, "host_gb": 270.0}
    step = 8192

    def after(lengths: dict[int, float], failed: int | None = None) -> int | None:
        return program.next_length(_tries(program, lengths, failed=failed), **options)

    assert after({}) == 32_768
    assert after({32_768: 20.0}) == 65_536
    # 10 GB per 32,768 tokens: 97% of 85 GB are reached at 237,306.
    assert after({32_768: 20.0, 65_536: 30.0}) == 28 * step
    # What the allocator holds stops growing at the limit. The line through the last two would never reach it.
    assert after({131_072: 48.8, 262_144: 83.4, 270_336: 83.3}) == 270_336 + step
    assert after({131_072: 48.8, 262_144: 83.4}, failed=294_912) == (262_144 + 294_912) // 2
    assert after({131_072: 48.8, 262_144: 83.4}, failed=270_336) is None


def test_a_part_of_the_child_has_its_widest_blocks(load: Load) -> None:
    program = load("longest_sequence")
    part, child = (set(program.SHAPES[name]) for name in ("8b_child_part", "8b_child"))
    assert part <= child
    # Its widest attention has a block before it, whose input is fetched meanwhile.
    assert program.SHAPES["8b_child_part"][1] == program.CHILD[0]
    assert max(width for _, width, _ in part) == max(width for _, width, _ in child)
    assert max(heads or 0 for heads, *_ in part) == max(heads or 0 for heads, *_ in child)


def test_a_cache_holds_whole_steps_of_what_is_trained(load: Load) -> None:
    program = load("teacher_cache")
    overrides = ["model=hub", "model.source=x", "data=python_stdlib", "distill.batch_size=16"]
    assert program.whole_steps(400_000, 128, overrides) == 196 * 16 * 128
    assert program.whole_steps(0, 128, overrides) == 0


def test_gradients_are_compared_in_fp64(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("teacher_cache")
    monkeypatch.setattr(program, "_PIECE", 1000)
    expected = torch.randn(2500, generator=torch.Generator().manual_seed(0))
    across = torch.randn(2500, generator=torch.Generator().manual_seed(1))
    across -= expected * (expected @ across) / (expected @ expected)
    found = 2 * expected + across
    error, cosine = program.distance(found, expected)
    a, b = found.double(), expected.double()
    assert error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-12)
    assert cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-12)
    assert program.distance(expected, expected) == (0, pytest.approx(1, rel=1e-15))


def test_host_memory_that_no_process_counts_as_its_own_is_taken(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is missing from a process's resident memory, and from the memory that the host has left."""
    trials = load("training_trials")
    free = iter([100, 30, 80])
    monkeypatch.setattr(trials, "available_host_bytes", lambda: next(free, 90))
    monkeypatch.setattr(trials, "SAMPLE_S", 0.01)
    waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert trials.watch(waiting, timeout_s=0.2) == 30
        assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.wait()


def _pico_trial(load: Load, directory: Path, *, steps: int = 1) -> Any:
    """LM steps of a pico student on the CPU."""
    trials, throughput = load("training_trials"), load("kd_throughput")
    student, _ = throughput.shapes("pico")
    trials.write_random_model(directory / "student", student)
    fields = {"engine": {"device": "cpu"}, "objective": {"lm": 1.0}, "batch_size": 1, "seq_len": 16}
    return trials.Trial(student=str(directory / "student"), steps=steps, **fields)


@pytest.mark.slow
def test_trial_reports_what_it_took_of_the_host(load: Load, tmp_path: Path) -> None:
    trials = load("training_trials")
    trial = _pico_trial(load, tmp_path)
    outcome = trials.run_trial(trial, num_processes=1, timeout_s=50)
    assert outcome.failure is None
    # Python with torch is larger than this; what else the host does is in the other number.
    assert outcome.host_resident_bytes > 100e6
    assert 0 < outcome.host_taken_bytes < trials.meminfo_bytes("MemTotal")


def test_what_is_compared_is_measured_first_and_the_rest_once(load: Load) -> None:
    program = load("run")
    compared = ["ours", "liger_chunked", "trl", "liger_fused", "plain"]
    contenders = ["ours_512", "four_products", *reversed(compared)]
    cases = program._cases(SimpleNamespace(contenders=contenders, divergences=["forward", "jsd"]))
    expected = [(divergence, name) for divergence in ("forward", "jsd") for name in compared]
    assert cases == [*expected, ("forward", "four_products"), ("forward", "ours_512")]


@pytest.mark.slow
def test_a_trial_that_runs_out_of_time_leaves_no_process(load: Load, tmp_path: Path) -> None:
    """Its workers are in sessions of their own, where a signal to torchrun's does not reach them."""
    trials = load("training_trials")
    trial = _pico_trial(load, tmp_path, steps=1_000_000)
    marker = str(tmp_path / "temporary")
    Path(marker).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.tempfile, "tempdir", marker)
        assert trials.run_trial(trial, num_processes=1, timeout_s=15).failure == trials.TIME
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            assert marker.encode() not in path.read_bytes()
