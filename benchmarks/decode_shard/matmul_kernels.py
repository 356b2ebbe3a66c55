"""Triton kernels for products of few tokens with one rank's weights: y = x W^T with W [N, K] in fp8 or bf16.

``gemv_kernel`` is for one token: no tensor cores, many small programs so that memory is never idle. ``skinny_kernel``
is for up to 64 tokens: the weights are the left operand of the tensor-core product and the tokens the narrow right one,
so that no row of a tile is padding of weights; K is split over programs, and the last one to finish an output tile adds
up the parts of all.

Both have the same options. FP8 weights (e4m3) carry one scale per output channel. ``X_MODE`` says what x is: PLAIN:
values of the weights' type as they are (bf16); SCALED: e4m3 with one scale per token; AMAX: bf16 with the largest
magnitude per token, quantised to e4m3 on the way. ``SWIGLU``: W holds N rows of the gate, then N of the up projection,
and y = silu(gate) * up; with fp8, the largest magnitude per token of y is collected in ``amax_out``.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
SCALED = tl.constexpr(1)
AMAX = tl.constexpr(2)
FP8_MAX = tl.constexpr(448.0)
"""Largest finite value of e4m3."""
MIN_AMAX = tl.constexpr(1e-6)
"""Keeps the scale of a token that is all zeros away from 0."""


@triton.jit
def token_scale(amax):
    """Scale of a token whose largest magnitude is ``amax``."""
    return tl.maximum(amax, MIN_AMAX) / FP8_MAX


@triton.jit
def quantised(values, scale):
    """``values / scale`` in e4m3, saturated."""
    return tl.clamp(values / scale, -FP8_MAX, FP8_MAX).to(tl.float8e4nv)


@triton.jit
def silu_times(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gemv_kernel(
    x, x_scale, w, w_scale, out, amax_out, N, K,
    FP8: tl.constexpr, X_MODE: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token. Grid: (ceil(N / BLOCK_N),)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    columns = tl.arange(0, BLOCK_K)
    row_starts = rows.to(tl.int64) * K
    tile = w + row_starts[:, None] + columns[None, :]
    up_tile = tile + N.to(tl.int64) * K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    scale = 1.0
    if X_MODE == SCALED:
        scale = tl.load(x_scale)
    if X_MODE == AMAX:
        scale = token_scale(tl.load(x_scale))
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column_mask = columns < K - start
        mask = row_mask[:, None] & column_mask[None, :]
        values = tl.load(x + start + columns, mask=column_mask, other=0.0)
        if X_MODE == AMAX:
            values = quantised(values.to(tl.float32), scale)
        values = values.to(tl.float32)[None, :]
        weights = tl.load(tile + start, mask=mask, other=0.0, eviction_policy="evict_first")
        sums += weights.to(tl.float32) * values
        if SWIGLU:
            weights = tl.load(up_tile + start, mask=mask, other=0.0, eviction_policy="evict_first")
            up_sums += weights.to(tl.float32) * values
    result = tl.sum(sums, axis=1)
    if FP8:
        result *= scale * tl.load(w_scale + rows, mask=row_mask, other=0.0)
    if SWIGLU:
        up = tl.sum(up_sums, axis=1)
        if FP8:
            up *= scale * tl.load(w_scale + N + rows, mask=row_mask, other=0.0)
        result = silu_times(result, up)
        if FP8:
            tl.atomic_max(amax_out, tl.max(tl.where(row_mask, tl.abs(result), 0.0), axis=0))
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _summed_parts(parts, offsets, mask, part_size, num_splits, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in range(num_splits):
        # Past L1: other multiprocessors wrote these.
        total += tl.load(parts + split * part_size + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["M", "num_splits", "steps_per_split"])
def skinny_kernel(
    x, x_scale, w, w_scale, out, amax_out, parts, tickets, M, N, K, num_splits, steps_per_split,
    FP8: tl.constexpr, X_MODE: tl.constexpr, SWIGLU: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M tokens. Grid: (ceil(N / BLOCK_N), num_splits).

    SPLIT: whether num_splits > 1. ``parts``: float32 [num_splits, 1 or 2 with SWIGLU, M, N]. ``tickets``: int32
    [ceil(N / BLOCK_N)], 0 before and after.
    """
    tile_index, split = tl.program_id(0), tl.program_id(1)
    rows = tile_index * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    row_mask, token_mask = rows < N, tokens < M
    row_starts = rows.to(tl.int64) * K
    tile = w + row_starts[:, None] + columns[None, :]
    up_tile = tile + N.to(tl.int64) * K
    x_tile = x + columns[:, None] + tokens[None, :] * K
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if X_MODE == SCALED:
        scale = tl.load(x_scale + tokens, mask=token_mask, other=1.0)
    if X_MODE == AMAX:
        scale = token_scale(tl.load(x_scale + tokens, mask=token_mask, other=1.0))
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BLOCK_K
        column_mask = columns < K - start
        mask = row_mask[:, None] & column_mask[None, :]
        values = tl.load(x_tile + start, mask=column_mask[:, None] & token_mask[None, :], other=0.0)
        if X_MODE == AMAX:
            values = quantised(values.to(tl.float32), scale[None, :])
        sums = tl.dot(tl.load(tile + start, mask=mask, other=0.0), values, sums)
        if SWIGLU:
            up_sums = tl.dot(tl.load(up_tile + start, mask=mask, other=0.0), values, up_sums)

    out_mask = row_mask[:, None] & token_mask[None, :]
    offsets = tokens[None, :] * N + rows[:, None]
    finished = tile_index >= 0
    if SPLIT:
        part_size = M * N * (2 if SWIGLU else 1)
        if SWIGLU:
            tl.store(parts + split * part_size + M * N + offsets, up_sums, mask=out_mask)
        tl.store(parts + split * part_size + offsets, sums, mask=out_mask)
        # All threads have stored before one of them draws the ticket.
        tl.debug_barrier()
        finished = tl.atomic_add(tickets + tile_index, 1, sem="acq_rel") == num_splits - 1
        if finished:
            tl.debug_barrier()
            sums = _summed_parts(parts, offsets, out_mask, part_size, num_splits, BLOCK_N, BLOCK_M)
            if SWIGLU:
                up_sums = _summed_parts(parts + M * N, offsets, out_mask, part_size, num_splits, BLOCK_N, BLOCK_M)
            tl.store(tickets + tile_index, 0)
    if finished:
        if FP8:
            sums *= scale[None, :] * tl.load(w_scale + rows, mask=row_mask, other=0.0)[:, None]
        if SWIGLU:
            if FP8:
                up_sums *= scale[None, :] * tl.load(w_scale + N + rows, mask=row_mask, other=0.0)[:, None]
            sums = silu_times(sums, up_sums)
            if FP8:
                largest = tl.max(tl.where(out_mask, tl.abs(sums), 0.0), axis=0)
                tl.atomic_max(amax_out + tokens, largest, mask=token_mask)
        tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["N"])
def swiglu_kernel(gate_up, out, amax_out, N, FP8: tl.constexpr, BLOCK_N: tl.constexpr):
    """silu(gate) * up of ``gate_up`` [M, 2 N] and its largest magnitude per token. Grid: (M, ceil(N / BLOCK_N))."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    gate = tl.load(gate_up + token * 2 * N + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * N + N + columns, mask=mask, other=0.0).to(tl.float32)
    values = silu_times(gate, up)
    if FP8:
        tl.atomic_max(amax_out + token, tl.max(tl.abs(values), axis=0))
    tl.store(out + token * N + columns, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def quantise_kernel(values, amax, out, scale_out, N, BLOCK_N: tl.constexpr):
    """``values`` [M, N] in e4m3 by the largest magnitudes ``amax`` [M]. Grid: (M, ceil(N / BLOCK_N))."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    scale = token_scale(tl.load(amax + token))
    loaded = tl.load(values + token * N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * N + columns, quantised(loaded, scale), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(scale_out + token, scale)
