"""Metrics of training steps: from the device in one transfer, into rows of the curve."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor

Row = dict[str, float]
"""One point of the curve: ``tokens`` (x) and metrics by name."""


class StepMeter:
    """Collects step metrics on the device and turns them into rows when asked.

    Reading a metric waits for the device, so steps are read in batches.

    Args:
        device: where the training runs.
        tokens_per_step: tokens of one optimizer step.
        step_s_at_peak: seconds that one would take at the devices' peak rate; None: not known.
    """

    def __init__(self, device: torch.device, *, tokens_per_step: int, step_s_at_peak: float | None = None) -> None:
        self._device = device
        self._step_s_at_peak = step_s_at_peak
        self._tokens_per_step = tokens_per_step
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._started = time.perf_counter()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, metrics: dict[str, Tensor], *, tokens: int, lr: float) -> None:
        """Keep one step's scalars, which stay on the device. ``tokens`` counts those of this step."""
        self._pending.append((tokens, lr, metrics))

    def flush(self) -> list[Row]:
        """One row per step since the last flush; speed and peak memory stand in the last of them."""
        names = list(self._pending[0][2])
        values = torch.stack([metrics[name].float() for _, _, metrics in self._pending for name in names])
        table = values.reshape(len(self._pending), len(names)).tolist()
        rows = [
            {
                "tokens": tokens,
                "optim/lr": lr,
                **{_row_name(name): value for name, value in zip(names, line, strict=True)},
            }
            for (tokens, lr, _), line in zip(self._pending, table, strict=True)
        ]
        seconds = time.perf_counter() - self._started
        rows[-1]["perf/tokens_per_s"] = len(rows) * self._tokens_per_step / seconds
        if self._step_s_at_peak is not None:
            rows[-1]["perf/mfu_frac"] = len(rows) * self._step_s_at_peak / seconds
        rows[-1]["mem/peak_gib"] = peak_memory_gib(self._device)
        self._pending.clear()
        self.restart()
        return rows

    def restart(self) -> None:
        """Leave the time since the last flush (an evaluation, a resume point) out of the throughput."""
        self._started = time.perf_counter()


def _row_name(name: str) -> str:
    return "optim/grad_norm" if name == "grad_norm" else f"train/{name}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at once so far: by torch on a CUDA device, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
