"""What stands between the products of one decoded token, as Triton launches and as plain torch with the same effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from products import FP8, FP8_MAX, MIN_AMAX, Activation, Workspace
from token_kernels import attention_kernel, combine_kernel, norm_kernel, rotary_kernel
from torch import Tensor

ATTENTION_BLOCK = 64
"""Cached tokens per step."""
MAX_ATTENTION_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all queries."""
        return self.num_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Channels of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where the new tokens stand: ``positions`` [M] (int32), rotary tables [positions, head_dim / 2] (float32)."""

    positions: Tensor
    cosines: Tensor
    sines: Tensor


class TokenOps(Protocol):
    """All write into given memory."""

    def norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, out: Activation, amax_reset: Tensor, eps: float
    ) -> None:
        """residual += added; out = RMSNorm(residual) * weight; amax_reset = 0."""

    def rotate(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads) -> None:
        """Rotate queries in place, put rotated keys and values into ``cache`` [2, M, KV heads, positions, head_dim]."""

    def attend(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads, out: Activation) -> None:
        """out = attention of the queries to the cache, up to the new token."""


class TritonOps:
    """The kernels of token_kernels.py."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, out: Activation, amax_reset: Tensor, eps: float
    ) -> None:
        num_tokens, width = residual.shape
        norm_kernel[(num_tokens,)](
            residual, added, weight, out.values, out.scale, amax_reset, width, eps,
            HAS_ADDED=added is not None, FP8=out.scale is not None, BLOCK_H=triton.next_power_of_2(width),
            num_warps=16 if width > 4096 else 8,
        )  # fmt: skip

    def rotate(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads) -> None:
        num_tokens = qkv.shape[0]
        rotary_kernel[(num_tokens, heads.num_heads + 2 * heads.num_kv_heads)](
            qkv, context.cosines, context.sines, context.positions, cache, num_tokens, cache.shape[3],
            NUM_HEADS=heads.num_heads, NUM_KV_HEADS=heads.num_kv_heads, HALF=heads.head_dim // 2, num_warps=1,
        )  # fmt: skip

    def attend(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads, out: Activation) -> None:
        num_tokens = qkv.shape[0]
        splits = attention_splits(num_tokens * heads.num_kv_heads, cache.shape[3])
        parts = self.workspace.take("attention", (splits, num_tokens, heads.width), torch.float32)
        log_sums = self.workspace.take("log_sums", (splits, num_tokens, heads.num_heads), torch.float32)
        group = triton.next_power_of_2(heads.num_heads // heads.num_kv_heads)
        attention_kernel[(num_tokens * heads.num_kv_heads, splits)](
            qkv, cache, context.positions, parts, log_sums, num_tokens, cache.shape[3], splits,
            heads.head_dim**-0.5, NUM_HEADS=heads.num_heads, NUM_KV_HEADS=heads.num_kv_heads,
            GROUP=max(16, group), HEAD_DIM=heads.head_dim, BLOCK_T=ATTENTION_BLOCK, STAGES=2, num_warps=4,
        )  # fmt: skip
        combine_kernel[(num_tokens,)](
            parts, log_sums, out.values, out.scale, num_tokens,
            NUM_SPLITS=splits, NUM_HEADS=heads.num_heads, HEAD_DIM=heads.head_dim, FP8=out.scale is not None,
            BLOCK=triton.next_power_of_2(heads.width), num_warps=16,
        )  # fmt: skip


class PlainOps:
    """Plain torch: what the kernels are held against, and what runs where one of them fails."""

    def norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, out: Activation, amax_reset: Tensor, eps: float
    ) -> None:
        if added is not None:
            residual.copy_(residual.float() + added.float())
        values = residual.float()
        inverse = torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
        _write(values * inverse * weight.float(), out)
        amax_reset.zero_()

    def rotate(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads) -> None:
        num_tokens = qkv.shape[0]
        each = qkv.view(num_tokens, -1, heads.head_dim)
        rotated, values = each[:, : heads.num_heads + heads.num_kv_heads], each[:, -heads.num_kv_heads :]
        where = context.positions.long()
        cosine, sine = context.cosines[where][:, None], context.sines[where][:, None]
        low, high = rotated.float().chunk(2, dim=2)
        rotated.copy_(torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=2))
        tokens = torch.arange(num_tokens, device=qkv.device)
        cache[0, tokens, :, where] = rotated[:, heads.num_heads :]
        cache[1, tokens, :, where] = values

    def attend(self, qkv: Tensor, context: Context, cache: Tensor, heads: Heads, out: Activation) -> None:
        num_tokens = qkv.shape[0]
        queries = qkv.view(num_tokens, -1, heads.head_dim)[:, : heads.num_heads]
        queries = queries.reshape(num_tokens, heads.num_kv_heads, -1, heads.head_dim).float()
        scores = queries @ cache[0].float().transpose(2, 3) * heads.head_dim**-0.5
        unseen = torch.arange(cache.shape[3], device=qkv.device)[None] > context.positions[:, None]
        weights = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(dim=3)
        _write((weights @ cache[1].float()).reshape(num_tokens, -1), out)


def attention_splits(num_pairs: int, num_positions: int) -> int:
    """Parts of the cache that fill the device with programs, each with one step at least; a power of two, which are
    few to compile for."""
    wanted = max(1, min(264 // num_pairs, num_positions // ATTENTION_BLOCK, MAX_ATTENTION_SPLITS))
    return 2 ** (wanted.bit_length() - 1)


def _write(values: Tensor, out: Activation) -> None:
    if out.scale is None:
        out.values.copy_(values)
        return
    scale = values.abs().amax(dim=1).clamp(min=MIN_AMAX) / FP8_MAX
    out.scale.copy_(scale)
    out.values.copy_((values / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8))
