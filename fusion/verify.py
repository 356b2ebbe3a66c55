"""Evidence that a fused checkpoint computes what fusion promises: the parallel sum of the members (paper, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fusion.fuse import DOWN, GATE, NORM, UP, Norm
from fusion.grouping import Group, block_spans
from puzzle.model.checkpoint import TensorReader, read_architecture
from puzzle.model.tensor_layout import block_prefix

FP32_TOLERANCE = 1e-5
"""Relative; sums of some 10,000 fp32 products taken in another order differ by about 1e-6."""

_CHUNK_CHANNELS = 16_384
"""FFN channels that are cast and multiplied at once, so that a fused FFN of any width is verified in bounded memory."""


@dataclass(frozen=True, kw_only=True)
class GroupErrors:
    """How far one fused FFN is from the parallel sum of its members: largest ||fused - sum|| / ||sum|| of any token."""

    first: int
    last: int
    """Members, as blocks of the unfused model, inclusive."""
    block: int
    """The fused block, as a block of the fused model."""
    max_relative_error_fp32: float
    """Both sides computed in fp32."""
    max_relative_error_fp64: float
    """Both sides computed in fp64 from the stored weights: the rounding of the folded weights alone."""


def verify_fusion(
    model_dir: Path, fused_dir: Path, groups: Sequence[Group], norm: Norm, *, num_tokens: int = 64, seed: int = 0
) -> tuple[GroupErrors, ...]:
    """Compare every fused FFN with the parallel sum of its members on random inputs.

    The members come from the unfused checkpoint, each behind its own norm ("folded") or all behind the last member's
    ("last"). Weights are read tensor by tensor; no arithmetic of fusion.fuse takes part.

    Args:
        model_dir: checkpoint before fusion.
        fused_dir: checkpoint after fusion.
        groups: the groups that were fused, in rising order.
        norm: how they were fused.
        num_tokens: standard normal inputs per group.
        seed: of the inputs.

    Raises:
        RuntimeError: a fused FFN is further from the sum than :func:`tolerance` allows, in fp32.
    """
    architecture = read_architecture(model_dir)
    spans = block_spans(architecture.num_blocks, groups)
    generator = torch.Generator().manual_seed(seed)
    results = []
    with TensorReader(model_dir) as unfused, TensorReader(fused_dir) as fused:
        for first, last in tqdm(groups, desc="verify fusion", unit="group", leave=False):
            block = spans.index((first, last))
            hidden = torch.randn(num_tokens, architecture.hidden_dim, generator=generator, dtype=torch.float64)
            errors = {}
            for dtype in (torch.float32, torch.float64):
                inputs = hidden.to(dtype)
                expected = _parallel_sum(unfused, (first, last), inputs, norm=norm, eps=architecture.norm_eps)
                actual = _ffn_update(fused, block, inputs, norm_block=block, eps=architecture.norm_eps)
                errors[dtype] = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
            result = GroupErrors(
                first=first,
                last=last,
                block=block,
                max_relative_error_fp32=errors[torch.float32],
                max_relative_error_fp64=errors[torch.float64],
            )
            _check(result, tolerance(norm, fused.dtype(block_prefix(block) + GATE)))
            results.append(result)
    return tuple(results)


def tolerance(norm: Norm, dtype: torch.dtype) -> float:
    """Largest relative error in fp32 that is rounding and no more, for a checkpoint of ``dtype``.

    Norm "last" moves weights without changing them, so only the order of fp32 sums differs. "folded" rounds gate and up
    weights once to ``dtype``, each by half an epsilon at most; both reach the output, and twice their sum is allowed
    because SiLU can amplify the gate's: 1e-5 for fp32, 1.6e-2 for bf16.
    """
    return FP32_TOLERANCE if norm == "last" else max(FP32_TOLERANCE, 2 * torch.finfo(dtype).eps)


def _check(result: GroupErrors, allowed: float) -> None:
    error = result.max_relative_error_fp32
    # NaN is neither within nor over the tolerance.
    if math.isnan(error) or error > allowed:
        raise RuntimeError(
            f"fused block {result.block} differs from the parallel sum of blocks {result.first}-{result.last} by "
            f"{error:.3g} relative in fp32, over the tolerance of {allowed:.3g}: a defect, if all weights are finite"
        )


def _parallel_sum(reader: TensorReader, group: Group, hidden: Tensor, *, norm: Norm, eps: float) -> Tensor:
    """Sum over the members of ``group`` of FFN(norm(hidden)), all of the same hidden [tokens, hidden]."""
    first, last = group
    total = torch.zeros_like(hidden)
    for member in range(first, last + 1):
        total += _ffn_update(reader, member, hidden, norm_block=member if norm == "folded" else last, eps=eps)
    return total


def _ffn_update(reader: TensorReader, block: int, hidden: Tensor, *, norm_block: int, eps: float) -> Tensor:
    """FFN(norm(hidden)) of ``block`` behind the norm of ``norm_block``, in the data type of hidden [tokens, hidden]."""
    scale = reader.read(block_prefix(norm_block) + NORM).to(hidden.dtype)
    normed = F.rms_norm(hidden, (hidden.shape[-1],), scale, eps)
    gate, up, down = (reader.read(block_prefix(block) + name) for name in (GATE, UP, DOWN))
    update = torch.zeros_like(hidden)
    for start in range(0, gate.shape[0], _CHUNK_CHANNELS):
        chunk = slice(start, start + _CHUNK_CHANNELS)
        channels = F.silu(F.linear(normed, gate[chunk].to(hidden.dtype))) * F.linear(normed, up[chunk].to(hidden.dtype))
        update += F.linear(channels, down[:, chunk].to(hidden.dtype))
    return update
