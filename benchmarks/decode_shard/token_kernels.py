"""Triton kernels between the matrix products of one decoded token per sequence: residual, norm, rotary, attention.

The KV cache of one attention is [2, batch, KV heads, positions, head_dim] in bf16, keys first. ``positions`` [batch]
(int32) is where the new token of each sequence stands; it attends to all before it and to itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from matmul_kernels import quantised, token_scale


@triton.jit
def norm_kernel(
    residual, added, weight, out, scale_out, amax_reset, H, eps,
    HAS_ADDED: tl.constexpr, FP8: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """residual += added, in place; out = RMSNorm(residual), in e4m3 with a scale per token or in bf16. Grid: (M,).

    Also sets ``amax_reset`` [M] to 0, where the FFN behind it collects the largest magnitude of its channels.
    """
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK_H)
    mask = columns < H
    values = tl.load(residual + token * H + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDED:
        values += tl.load(added + token * H + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + token * H + columns, rounded, mask=mask)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / H + eps)
    values = values * inverse * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if FP8:
        scale = token_scale(tl.max(tl.abs(values), axis=0))
        tl.store(out + token * H + columns, quantised(values, scale), mask=mask)
        tl.store(scale_out + token, scale)
        tl.store(amax_reset + token, 0.0)
    else:
        tl.store(out + token * H + columns, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def rotary_kernel(
    qkv, cosines, sines, positions, cache, batch, num_positions,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate the queries of ``qkv`` [M, (heads + 2 KV heads) * head_dim] in place; rotated keys and the values go to
    the cache. ``cosines``, ``sines``: [positions, head_dim / 2]. Grid: (M, heads + 2 KV heads)."""
    token, head = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, HALF)
    position = tl.load(positions + token)
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * 2 * HALF
    low = tl.load(source + half).to(tl.float32)
    high = tl.load(source + HALF + half).to(tl.float32)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    cosine = tl.where(is_value, 1.0, tl.load(cosines + position * HALF + half))
    sine = tl.where(is_value, 0.0, tl.load(sines + position * HALF + half))
    rotated_low = (low * cosine - high * sine).to(qkv.dtype.element_ty)
    rotated_high = (high * cosine + low * sine).to(qkv.dtype.element_ty)
    if head < NUM_HEADS:
        tl.store(source + half, rotated_low)
        tl.store(source + HALF + half, rotated_high)
    else:
        kind = (head - NUM_HEADS) // NUM_KV_HEADS
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        row = ((kind * batch + token) * NUM_KV_HEADS + kv_head).to(tl.int64) * num_positions + position
        tl.store(cache + row * 2 * HALF + half, rotated_low)
        tl.store(cache + row * 2 * HALF + HALF + half, rotated_high)


@triton.jit(do_not_specialize=["batch", "num_splits"])
def attention_kernel(
    qkv, cache, positions, parts, log_sums, batch, num_positions, num_splits, softmax_scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one KV head to one part of the cache. Grid: (M * KV heads, num_splits).

    ``parts``: float32 [num_splits, M, heads, head_dim], each normalised by itself; ``log_sums``: float32
    [num_splits, M, heads], the logarithm to base 2 of what it was divided by.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    token, kv_head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    heads_per_kv: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    group, dims, block = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_T)
    group_mask = group < heads_per_kv
    heads = kv_head * heads_per_kv + group
    row = token * (NUM_HEADS + 2 * NUM_KV_HEADS) + heads
    queries = tl.load(qkv + row[:, None] * HEAD_DIM + dims[None, :], mask=group_mask[:, None], other=0.0)
    length = tl.load(positions + token) + 1
    span = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_T) * BLOCK_T
    first = split * span
    last = tl.minimum(first + span, length)
    keys = cache + (token * NUM_KV_HEADS + kv_head).to(tl.int64) * num_positions * HEAD_DIM
    values = keys + batch.to(tl.int64) * NUM_KV_HEADS * num_positions * HEAD_DIM
    maximum = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    output = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        where = start + block
        seen = where < last
        key = tl.load(keys + where[None, :] * HEAD_DIM + dims[:, None], mask=seen[None, :], other=0.0)
        value = tl.load(values + where[:, None] * HEAD_DIM + dims[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(queries, key) * (softmax_scale * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, -1e30)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, axis=1)
        output = tl.dot(weights.to(value.dtype), value, output * decay[:, None])
        maximum = new_maximum
    part = (split * batch + token) * NUM_HEADS + heads
    # A part beyond the end of the context has seen nothing and counts for nothing.
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], output / divisor[:, None], mask=group_mask[:, None])
    tl.store(log_sums + part, tl.where(total > 0, maximum + tl.log2(divisor), -1e30), mask=group_mask)


@triton.jit(do_not_specialize=["batch"])
def combine_kernel(
    parts, log_sums, out, scale_out, batch,
    NUM_SPLITS: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the parts of one token's attention: out [M, heads * head_dim], e4m3 with a scale per token or bf16.
    Grid: (M,)."""
    token = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    mask = channels < NUM_HEADS * HEAD_DIM
    heads = channels // HEAD_DIM
    maximum = tl.full((BLOCK,), -1e30, tl.float32)
    # Unrolled, and the sum apart from the maximum: no load waits for another.
    for split in tl.static_range(NUM_SPLITS):
        row = (split * batch + token) * NUM_HEADS
        maximum = tl.maximum(maximum, tl.load(log_sums + row + heads, mask=mask, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    output = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        row = (split * batch + token) * NUM_HEADS
        weight = tl.exp2(tl.load(log_sums + row + heads, mask=mask, other=0.0) - maximum)
        output += weight * tl.load(parts + row * HEAD_DIM + channels, mask=mask, other=0.0)
        total += weight
    values = output / total
    where = token * NUM_HEADS * HEAD_DIM + channels
    if FP8:
        scale = token_scale(tl.max(tl.abs(values), axis=0))
        tl.store(out + where, quantised(values, scale), mask=mask)
        tl.store(scale_out + token, scale)
    else:
        tl.store(out + where, values.to(out.dtype.element_ty), mask=mask)
