"""One product of few tokens with one weight matrix, in all the ways that a serving engine could run it.

A :data:`Product` computes y = x W^T or, with a gate, silu(gate) * up. ``candidates`` has those that fit the case by
name: the Triton kernels of matmul_kernels.py in a few tile sizes, and the vendor's library with what it needs around
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
from matmul_kernels import AMAX, PLAIN, SCALED, gemv_kernel, quantise_kernel, skinny_kernel, swiglu_kernel
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX, MIN_AMAX = 448.0, 1e-6
MAX_SKINNY_TOKENS = 64
NUM_TICKETS = 16_384
"""Output tiles of a split product, at most."""
GEMV_TILES = ((4, 1024, 4, 1), (4, 1024, 4, 3), (8, 1024, 8, 3), (2, 2048, 4, 1), (8, 2048, 8, 1))
"""Rows of weights, bytes of each, warps, and tiles in flight."""
SKINNY_TILES = ((64, 256, 2), (64, 128, 4), (128, 128, 2))
"""Rows of weights, bytes of each, and programs per multiprocessor that K is split for."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """``values`` [N, K] in e4m3 with ``scale`` [N] (float32), or in 16 bits without."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Activation:
    """``values`` [M, K]; e4m3 with ``scale`` [M], or 16 bits with the largest magnitudes ``amax`` [M], or 16 bits."""

    values: Tensor
    scale: Tensor | None = None
    amax: Tensor | None = None

    @property
    def mode(self) -> str:
        return "scaled" if self.scale is not None else "amax" if self.amax is not None else "plain"


Product = Callable[[Activation, Weight, Tensor, Tensor | None], None]
"""(x, weight, out [M, N], amax_out [M] or None); with amax_out given the weight has 2 N rows where it is gated."""


class Workspace:
    """Scratch memory by name and size that keeps its address for CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on first use; later what the last user left."""
        num_values = max(1, torch.Size(shape).numel())
        key = (name, num_values, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(num_values, dtype=dtype, device=self.device)
        return self._tensors[key].view(shape)


def candidates(
    x: Activation, weight: Weight, *, gated: bool, workspace: Workspace, with_triton: bool = True
) -> dict[str, Product]:
    """Every way to run this product, by name; a way may still fail on a device."""
    if not with_triton:
        return {"library": partial(library, gated=gated, workspace=workspace, triton_around=False)}
    num_tokens, width = x.values.shape
    num_rows = weight.values.shape[0] // (2 if gated else 1)
    bytes_per_value = weight.values.element_size()
    ways: dict[str, Product] = {}
    if num_tokens == 1:
        for rows, row_bytes, warps, stages in GEMV_TILES:
            ways[f"gemv {rows}x{row_bytes}B*{stages}"] = partial(
                gemv, gated=gated, block_n=rows, block_k=row_bytes // bytes_per_value, num_warps=warps, stages=stages
            )
    if num_tokens <= MAX_SKINNY_TOKENS:
        for block_n, row_bytes, aim in SKINNY_TILES:
            block_k = row_bytes // bytes_per_value
            splits = num_splits(num_rows, width, block_n=block_n, block_k=block_k, aim=aim, device=x.values.device)
            ways[f"skinny {block_n}x{row_bytes}B/{splits}"] = partial(
                skinny, gated=gated, block_n=block_n, block_k=block_k, splits=splits, workspace=workspace
            )
    ways["library"] = partial(library, gated=gated, workspace=workspace)
    return ways


def num_splits(num_rows: int, width: int, *, block_n: int, block_k: int, aim: int, device: torch.device) -> int:
    """Parts of K that bring about ``aim`` programs per multiprocessor, each with four steps at least."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = round(aim * multiprocessors / triton.cdiv(num_rows, block_n))
    return max(1, min(wanted, triton.cdiv(width, block_k) // 4, 32))


def gemv(
    x: Activation, weight: Weight, out: Tensor, amax_out: Tensor | None,
    *, gated: bool, block_n: int, block_k: int, num_warps: int, stages: int,
) -> None:  # fmt: skip
    """One token without tensor cores."""
    num_rows, width = out.shape[1], x.values.shape[1]
    gemv_kernel[(triton.cdiv(num_rows, block_n),)](
        x.values, _scale_argument(x), weight.values, weight.scale, out, amax_out, num_rows, width,
        FP8=weight.scale is not None, X_MODE=_mode_argument(x), SWIGLU=gated, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, num_warps=num_warps,
    )  # fmt: skip


def skinny(
    x: Activation, weight: Weight, out: Tensor, amax_out: Tensor | None,
    *, gated: bool, block_n: int, block_k: int, splits: int, workspace: Workspace,
) -> None:  # fmt: skip
    """Up to 64 tokens on tensor cores, K in ``splits`` parts."""
    (num_tokens, num_rows), width = out.shape, x.values.shape[1]
    tiles = triton.cdiv(num_rows, block_n)
    parts_shape = (splits, 2 if gated else 1, num_tokens, num_rows) if splits > 1 else (1,)
    skinny_kernel[(tiles, splits)](
        x.values, _scale_argument(x), weight.values, weight.scale, out, amax_out,
        workspace.take("parts", parts_shape, torch.float32), workspace.take("tickets", (NUM_TICKETS,), torch.int32),
        num_tokens, num_rows, width, splits, triton.cdiv(triton.cdiv(width, block_k), splits),
        FP8=weight.scale is not None, X_MODE=_mode_argument(x), SWIGLU=gated, SPLIT=splits > 1,
        BLOCK_M=max(16, triton.next_power_of_2(num_tokens)), BLOCK_N=block_n, BLOCK_K=block_k,
        # Two tiles of weights per step would not leave room for a second program beside it.
        STAGES=3 if gated else 4, num_warps=4,
    )  # fmt: skip


def library(
    x: Activation, weight: Weight, out: Tensor, amax_out: Tensor | None,
    *, gated: bool, workspace: Workspace, triton_around: bool = True,
) -> None:  # fmt: skip
    """torch._scaled_mm with a scale per token and channel, or torch.mm; SwiGLU and quantisation in kernels of their
    own, or, where ``triton_around`` is off, in plain torch."""
    num_tokens, num_rows = out.shape
    target = workspace.take("gate_up", (num_tokens, 2 * num_rows), out.dtype) if gated else out
    if weight.scale is None:
        torch.mm(x.values, weight.values.t(), out=target)
    else:
        ready = x if x.scale is not None else _quantise(x, workspace) if triton_around else _plain_quantise(x)
        assert ready.scale is not None
        torch._scaled_mm(
            ready.values,
            weight.values.t(),
            scale_a=ready.scale[:, None],
            scale_b=weight.scale[None, :],
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=target,
        )
    if gated and not triton_around:
        gate, up = target.float().chunk(2, dim=1)
        out.copy_(functional.silu(gate) * up)
        if amax_out is not None:
            amax_out.copy_(out.float().abs().amax(dim=1))
    elif gated:
        block = 1024
        swiglu_kernel[(num_tokens, triton.cdiv(num_rows, block))](
            target, out, amax_out, num_rows, FP8=weight.scale is not None, BLOCK_N=block
        )


def _quantise(x: Activation, workspace: Workspace) -> Activation:
    num_tokens, width = x.values.shape
    values = workspace.take("quantised", (num_tokens, width), FP8)
    scale = workspace.take("quantised_scale", (num_tokens,), torch.float32)
    quantise_kernel[(num_tokens, triton.cdiv(width, 1024))](x.values, x.amax, values, scale, width, BLOCK_N=1024)
    return Activation(values=values, scale=scale)


def _plain_quantise(x: Activation) -> Activation:
    assert x.amax is not None
    scale = x.amax.clamp(min=MIN_AMAX) / FP8_MAX
    return Activation(values=(x.values.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale=scale)


def reference(x: Activation, weight: Weight, *, gated: bool, rows: Tensor | None = None) -> Tensor:
    """The same product in float32 by plain torch, for output channels ``rows`` alone if given."""
    num_rows = weight.values.shape[0] // (2 if gated else 1)
    rows = torch.arange(num_rows, device=x.values.device) if rows is None else rows
    values = plain_values(x)
    product = _rows_product(values, weight, rows)
    if gated:
        product = functional.silu(product) * _rows_product(values, weight, rows + num_rows)
    return product


def plain_values(x: Activation) -> Tensor:
    """``x`` in float32, quantised to e4m3 where the kernels would do so on the way."""
    if x.scale is not None:
        return x.values.float() * x.scale[:, None]
    if x.amax is not None:
        return plain_values(_plain_quantise(x))
    return x.values.float()


def plain(x: Activation, weight: Weight, out: Tensor, amax_out: Tensor | None, *, gated: bool) -> None:
    """The reference as a :data:`Product`: slow, and there where nothing else runs."""
    result = reference(x, weight, gated=gated)
    if gated and amax_out is not None:
        torch.amax(result.abs(), dim=1, out=amax_out)
    out.copy_(result)


def _rows_product(values: Tensor, weight: Weight, rows: Tensor) -> Tensor:
    product = (
        values
        @ weight.values.view(torch.uint8 if weight.scale is not None else weight.values.dtype)[rows]
        .view(weight.values.dtype)
        .float()
        .t()
    )
    return product if weight.scale is None else product * weight.scale[rows]


def _scale_argument(x: Activation) -> Tensor | None:
    return x.scale if x.scale is not None else x.amax


def _mode_argument(x: Activation) -> int:
    return {"plain": PLAIN, "scaled": SCALED, "amax": AMAX}[x.mode].value
