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

from fusion.config import Norm
from fusion.fuse import DOWN, GATE, NORM, UP
from fusion.grouping import Group, block_spans
from puzzle.model.checkpoint import read_architecture
from puzzle.model.tensor_layout import block_prefix
from puzzle.model.tensor_reader import TensorReader

FP32_TOLERANCE = 1e-5
"""Relative; sums of some 10,000 fp32 products taken in another order differ by about 1e-6."""

_CHUNK_BYTES = 16 * 2**20
"""Of a projection that is cast and multiplied at once."""
_DTYPES = (torch.float32, torch.float64)
"""What both sides are computed in."""


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
    ("last"). Weights are read in chunks of rows: memory is a few vectors of [num_tokens, channels of the widest fused
    FFN], never a projection. No arithmetic of fusion.fuse takes part.

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
            inputs = [hidden.to(dtype) for dtype in _DTYPES]
            expected = _parallel_sum(unfused, (first, last), inputs, norm=norm, eps=architecture.norm_eps)
            actual = _ffn_update(fused, block, inputs, norm_block=block, eps=architecture.norm_eps)
            fp32, fp64 = map(_largest_error, actual, expected)
            result = GroupErrors(
                first=first, last=last, block=block, max_relative_error_fp32=fp32, max_relative_error_fp64=fp64
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


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def _parallel_sum(
    reader: TensorReader, group: Group, inputs: Sequence[Tensor], *, norm: Norm, eps: float
) -> list[Tensor]:
    """Sum over the members of ``group`` of FFN(norm(hidden)), for every hidden [tokens, hidden] of ``inputs``."""
    first, last = group
    totals = [torch.zeros_like(hidden) for hidden in inputs]
    for member in range(first, last + 1):
        updates = _ffn_update(reader, member, inputs, norm_block=member if norm == "folded" else last, eps=eps)
        for total, update in zip(totals, updates, strict=True):
            total += update
    return totals


def _ffn_update(
    reader: TensorReader, block: int, inputs: Sequence[Tensor], *, norm_block: int, eps: float
) -> list[Tensor]:
    """FFN(norm(hidden)) of ``block`` behind the norm of ``norm_block``, for every hidden of ``inputs`` in its type."""
    scale = reader.read(block_prefix(norm_block) + NORM)
    normed = [F.rms_norm(hidden, (hidden.shape[-1],), scale.to(hidden.dtype), eps) for hidden in inputs]
    prefix = block_prefix(block)
    gates, ups = _project(reader, prefix + GATE, normed), _project(reader, prefix + UP, normed)
    return _project(reader, prefix + DOWN, [F.silu(gate).mul_(up) for gate, up in zip(gates, ups, strict=True)])


def _project(reader: TensorReader, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every [tokens, in] of ``inputs`` through the projection [out, in] of tensor ``name``, which is read once."""
    outputs = [each.new_empty(each.shape[0], reader.shape(name)[0]) for each in inputs]
    start = 0
    for rows in reader.row_chunks(name, _CHUNK_BYTES):
        for each, output in zip(inputs, outputs, strict=True):
            output[:, start : start + len(rows)] = F.linear(each, rows.to(each.dtype))
        start += len(rows)
    return outputs
