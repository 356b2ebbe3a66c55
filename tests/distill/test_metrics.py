from __future__ import annotations

import time

import pytest
import torch

from distill.metrics import StepMeter, peak_memory_gib

CPU = torch.device("cpu")


def test_flush_gives_a_row_per_step_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 4.0, 100.0, 101.0, 101.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = StepMeter(CPU, tokens_per_step=8)
    for step in (1, 2):
        metrics = {"loss": torch.tensor(1.0 / step), "grad_norm": torch.tensor(float(step))}
        meter.add(metrics, tokens=8 * step, lr=0.25 * step)
    assert len(meter) == 2
    first, last = meter.flush()
    assert first == {"tokens": 8, "optim/lr": 0.25, "train/loss": 1.0, "optim/grad_norm": 1.0}
    assert {name: last[name] for name in first} == {
        "tokens": 16,
        "optim/lr": 0.5,
        "train/loss": 0.5,
        "optim/grad_norm": 2.0,
    }
    assert last["perf/tokens_per_s"] == 16 / 4
    assert last["mem/peak_gib"] > 0
    assert len(meter) == 0

    meter.restart()  # an evaluation took from 4 to 100
    meter.add({"loss": torch.tensor(1.0)}, tokens=24, lr=0.5)
    assert meter.flush()[0]["perf/tokens_per_s"] == 8 / 1


@pytest.mark.parametrize(("step_s_at_peak", "expected"), [(None, None), (0.5, 2 * 0.5 / 4)])
def test_utilization_is_logged_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch, step_s_at_peak: float | None, expected: float | None
) -> None:
    clock = iter([0.0, 4.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = StepMeter(CPU, tokens_per_step=8, step_s_at_peak=step_s_at_peak)
    for step in (1, 2):
        meter.add({"loss": torch.tensor(1.0)}, tokens=8 * step, lr=0.25)
    first, last = meter.flush()
    assert "perf/mfu_frac" not in first
    assert last.get("perf/mfu_frac") == expected


def test_peak_memory_is_that_of_the_process() -> None:
    held = torch.ones(1 << 22)
    assert held.nbytes / 2**30 < peak_memory_gib(CPU) < 64
