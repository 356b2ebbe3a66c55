"""Which way runs a product fastest here: every candidate is checked, timed on cold weights, and the best is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from products import Activation, Product, Weight, Workspace, candidates, plain, reference
from timing import median_ms
from torch import Tensor

COLD_BYTES = 200 * 2**20
"""Weights that one timing runs through: several times the last-level cache."""
MIN_CALLS, MAX_CALLS = 4, 32
NUM_CHECKED_ROWS = 128
TOLERANCE = 0.03
"""Relative error of the checked output channels against float32: 16-bit outputs round to 0.004, and tensor cores add up
thousands of e4m3 products with about 13 bits."""
CPU_TOLERANCE = 0.1
"""Triton's interpreter cuts where e4m3 rounds."""


class Picker:
    """Remembers its picks by case, in memory and in a file that later processes read.

    Args:
        device: where to time.
        workspace: scratch memory of the products.
        path: file of picks; read if it is there, rewritten after each pick where ``keeps``.
        keeps: whether this process writes the file.
        triton: whether kernels of this project may be picked at all.
    """

    def __init__(
        self, *, device: torch.device, workspace: Workspace, path: Path | None, keeps: bool = True, triton: bool = True
    ) -> None:
        self.device, self.workspace, self.path, self.keeps, self.triton = device, workspace, path, keeps, triton
        self.microseconds: dict[str, dict[str, float]] = {}
        """Case -> way -> time of one product; the fastest is the pick."""
        self.failures: dict[str, str] = {}
        self._products: dict[str, Product] = {}
        if path is not None and path.exists():
            self.microseconds = json.loads(path.read_text())

    def pick(
        self, x: Activation, weights: Sequence[Weight], out: Tensor, amax: Tensor | None, *, gated: bool
    ) -> Product:
        """The fastest way that is right to compute ``out`` [M, N] from ``x`` and one of ``weights`` (equal shapes)."""
        case = case_name(x, weights[0], gated=gated)
        if case not in self._products:
            ways = candidates(x, weights[0], gated=gated, workspace=self.workspace, with_triton=self.triton)
            known = self.microseconds.get(case, {})
            known = {way: time for way, time in known.items() if way in ways}
            if not known:
                known = self._time(case, ways, x, weights, out, amax, gated=gated)
                self.microseconds[case] = known
                self._keep()
            best = min(known, key=known.__getitem__, default=None)
            self._products[case] = ways[best] if best is not None else partial(plain, gated=gated)
        return self._products[case]

    def picks(self) -> dict[str, str]:
        """Case -> way, for the cases that came up."""
        return {
            case: min(self.microseconds[case], key=self.microseconds[case].__getitem__, default="plain torch")
            for case in self._products
        }

    def _time(
        self,
        case: str,
        ways: dict[str, Product],
        x: Activation,
        weights: Sequence[Weight],
        out: Tensor,
        amax: Tensor | None,
        *,
        gated: bool,
    ) -> dict[str, float]:
        rows = _some_rows(out.shape[1], self.device)
        expected = reference(x, weights[0], gated=gated, rows=rows)
        weight_bytes = weights[0].values.numel() * weights[0].values.element_size()
        num_calls = max(MIN_CALLS, min(MAX_CALLS, COLD_BYTES // weight_bytes))
        # Without a GPU the first way that is right is as good as any.
        tolerance = TOLERANCE if self.device.type == "cuda" else CPU_TOLERANCE
        times = {}
        for way, product in ways.items():

            def run(product: Product = product) -> None:
                for call in range(num_calls):
                    product(x, weights[call % len(weights)], out, amax)

            try:
                out.fill_(float("nan"))
                product(x, weights[0], out, amax)
                error = ((out[:, rows].float() - expected).norm() / expected.norm()).item()
                # Written so that NaN fails too.
                if not error <= tolerance:
                    raise ArithmeticError(f"relative error {error:.3g}, over {tolerance}")
                times[way] = self._microseconds(run, num_calls) if self.device.type == "cuda" else float(len(times))
            except Exception as failure:
                # Whatever a compiler or a library raises rules this way out.
                self.failures[f"{case}: {way}"] = f"{type(failure).__name__}: {failure}"[:300]
        return dict(sorted(times.items(), key=lambda item: item[1]))

    def _microseconds(self, run: Callable[[], None], num_calls: int) -> float:
        return median_ms(run, replays=5, device=self.device) * 1e3 / num_calls

    def _keep(self) -> None:
        if self.path is not None and self.keeps:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.microseconds, indent=1))
            part.replace(self.path)


def case_name(x: Activation, weight: Weight, *, gated: bool) -> str:
    """``scaled gated fp8 M=1 N=6656 K=16384``; N counts outputs."""
    num_rows, width = weight.values.shape
    kind = "fp8" if weight.scale is not None else "bf16"
    outputs = num_rows // 2 if gated else num_rows
    return f"{x.mode}{' gated' if gated else ''} {kind} M={x.values.shape[0]} N={outputs} K={width}"


def _some_rows(num_rows: int, device: torch.device) -> Tensor:
    if num_rows <= NUM_CHECKED_ROWS:
        return torch.arange(num_rows, device=device)
    half = NUM_CHECKED_ROWS // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(num_rows - half, num_rows, device=device)])
