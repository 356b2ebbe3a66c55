"""Rates by measurement: filled in where they are null, and what they follow from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from puzzle import calibrate as module
from puzzle.analytic import modelled_all_reduce
from puzzle.calibrate import calibrate, calibrate_all_reduce, can_measure_all_reduce
from puzzle.config import CostConfig, HardwareConfig, WorkloadConfig

CPU = torch.device("cpu")
WORKLOAD = WorkloadConfig(prefill_tokens=8, generated_tokens=4)
CONFIG = CostConfig(repeats=1, warmup=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibration_fills_what_is_null(dtype, pico_architecture):
    given = HardwareConfig(flops_per_s=1e12)
    filled = calibrate(given, pico_architecture, workload=replace(WORKLOAD, dtype=dtype), device=CPU, config=CONFIG)
    assert (filled.name, filled.flops_per_s, filled.all_reduce_s) == (None, 1e12, None)
    assert filled.bytes_per_s > 0
    assert 0 < filled.kernel_launch_s < 1


def test_rates_that_are_given_need_no_measurement(pico_architecture, monkeypatch):
    monkeypatch.setattr(module, "interleaved_ms", None)
    given = HardwareConfig(flops_per_s=1.0, bytes_per_s=1.0, kernel_launch_s=0.0)
    assert calibrate(given, pico_architecture, workload=WORKLOAD, device=CPU, config=CONFIG) == given


@pytest.mark.parametrize(("most_bytes", "num_ranks", "rows"), [(2**30, 1, 472), (2**30, 2, 236), (2**20, 1, 256)])
def test_rates_follow_from_the_clock(pico_architecture, monkeypatch, most_bytes, num_ranks, rows):
    """A second for everything: the rates are then the work itself. As much is read as a rank has weights."""
    monkeypatch.setattr(module, "READ_BYTES", most_bytes)
    monkeypatch.setattr(
        module, "interleaved_ms", lambda steps, **_: {name: [1e3, 1e3, 5e3] for name, step in steps.items()}
    )
    workload = replace(WORKLOAD, tensor_parallel=num_ranks)
    filled = calibrate(HardwareConfig(), pico_architecture, workload=workload, device=CPU, config=CONFIG)
    assert filled.flops_per_s == 2 * 1024**3
    assert filled.bytes_per_s == rows * 1024 * 4
    # Of every tiny attention 6 + 18 operators, of every FFN 6 + 6.
    assert filled.kernel_launch_s == pytest.approx(1 / (module.NUM_TINY_BLOCKS * (24 + 12)))


def test_one_process_cannot_measure_an_all_reduce():
    workload = replace(WORKLOAD, tensor_parallel=2)
    assert not can_measure_all_reduce(workload)
    assert calibrate_all_reduce(HardwareConfig(), workload=workload, device=CPU, config=CONFIG) == HardwareConfig()


def test_the_model_of_an_all_reduce_is_the_line_through_two_sizes(monkeypatch):
    """Three ranks; a small one takes 2 ms, every byte beyond it 1 ns."""
    small = module.SMALL_REDUCTION_BYTES
    monkeypatch.setattr(module, "can_measure_all_reduce", lambda workload: True)
    monkeypatch.setattr(
        module, "measured_all_reduce_ms", lambda sizes, **_: {size: 2.0 + (size - small) / 1e6 for size in sizes}
    )
    workload = replace(WORKLOAD, tensor_parallel=3)
    filled = calibrate_all_reduce(HardwareConfig(), workload=workload, device=CPU, config=CONFIG)
    assert filled.all_reduce_s == pytest.approx(2e-3)
    assert filled.all_reduce_bytes_per_s == pytest.approx(4 / 3 * 1e9)
    large = module.LARGE_REDUCTION_BYTES
    # The small size itself is next to nothing on the line.
    assert modelled_all_reduce(filled, 3)(large) == pytest.approx(2.0 + large / 1e6, rel=1e-4)
    given = HardwareConfig(all_reduce_s=7.0)
    assert calibrate_all_reduce(given, workload=workload, device=CPU, config=CONFIG).all_reduce_s == 7.0


@pytest.mark.gpu
def test_rates_of_a_gpu(pico_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    filled = calibrate(
        HardwareConfig(),
        replace(pico_architecture, vocab_size=2**20),
        workload=replace(WORKLOAD, dtype="bfloat16"),
        device=device,
        config=replace(CONFIG, repeats=3),
    )
    # Above any CPU, below any GPU of the decade.
    assert 1e12 < filled.flops_per_s < 1e17
    assert 1e10 < filled.bytes_per_s < 1e14
    # Within a CUDA graph: without one it would be several times as much.
    assert filled.kernel_launch_s < 1e-5
