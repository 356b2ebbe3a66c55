"""Evidence that a fused checkpoint computes what fusion promises: the parallel sum of the members (paper, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
FP64_TOLERANCE = 1e-10
"""Relative; the same in fp64 differ by about 1e-15. A wrong channel of 400,000 is far over it."""

_CHUNK_BYTES = 2**20
"""Of a projection that is folded, cast and multiplied at once: its fp64 copies stay near the processor's cache, which
is three times as fast as with 16 MiB."""


@dataclass(frozen=True, kw_only=True)
class GroupErrors:
    """How far one fused FFN is from the parallel sum of its members: largest ||fused - sum|| / ||sum|| of any token."""

    first: int
    last: int
    """Members, as blocks of the unfused model, inclusive."""
    block: int
    """The fused block, as a block of the fused model."""
    max_relative_error_fp32: float
    """Both sides computed in fp32, the members' weights folded and rounded to the checkpoint's data type as the fused
    ones must be: what is left is the order of sums, whatever that type is."""
    max_relative_error_fp64: float
    """The same, both sides computed in fp64."""
    max_relative_rounding: float
    """Both sides computed in fp64, the members' weights as they are: what rounding the folded weights costs."""


@dataclass(frozen=True, kw_only=True)
class _Side:
    """How one of several results of the same weights is computed."""

    hidden: Tensor
    """Input [tokens, hidden]; its data type is the one computed in."""
    stored: torch.dtype | None
    """Weights are folded, and rounded to this, before they are cast to that type. None: they are used as they are."""


def verify_fusion(
    model_dir: Path, fused_dir: Path, groups: Sequence[Group], norm: Norm, *, num_tokens: int = 16, seed: int = 0
) -> tuple[GroupErrors, ...]:
    """Compare every fused FFN with the parallel sum of its members on random inputs.

    The members come from the unfused checkpoint, each behind its own norm ("folded") or all behind the last member's
    ("last"). Their weights are rounded as the fused checkpoint's must be, so that one lost channel shows in bf16 as it
    does in fp32; what the rounding itself costs is reported apart. Weights are read in chunks of rows: memory is a few
    vectors of [num_tokens, channels of the widest fused FFN], never a projection. No arithmetic of fusion.fuse takes
    part.

    Args:
        model_dir: checkpoint before fusion.
        fused_dir: checkpoint after fusion.
        groups: the groups that were fused, in rising order.
        norm: how they were fused.
        num_tokens: standard normal inputs per group; every one of them reads every weight.
        seed: of the inputs.

    Raises:
        RuntimeError: a fused FFN is further from the sum than FP32_TOLERANCE in fp32 or FP64_TOLERANCE in fp64.
    """
    architecture = read_architecture(model_dir)
    spans = block_spans(architecture.num_blocks, groups)
    generator = torch.Generator().manual_seed(seed)
    results = []
    with TensorReader(model_dir) as unfused, TensorReader(fused_dir) as fused:
        for group in tqdm(groups, desc="verify fusion", unit="group", leave=False):
            block = spans.index(group)
            hidden = torch.randn(num_tokens, architecture.hidden_dim, generator=generator, dtype=torch.float64)
            stored = fused.dtype(block_prefix(block) + GATE)
            result = _errors(unfused, fused, group, block, hidden, stored, norm=norm, eps=architecture.norm_eps)
            _check(result)
            results.append(result)
    return tuple(results)


def _errors(
    unfused: TensorReader,
    fused: TensorReader,
    group: Group,
    block: int,
    hidden: Tensor,
    stored: torch.dtype,
    *,
    norm: Norm,
    eps: float,
) -> GroupErrors:
    """``block`` of the fused checkpoint, whose data type is ``stored``, beside the members on ``hidden`` (fp64)."""
    fp32, fp64, exact = (
        _Side(hidden=hidden.float(), stored=stored),
        _Side(hidden=hidden, stored=stored),
        _Side(hidden=hidden, stored=None),
    )
    sum_fp32, sum_fp64, sum_exact = _parallel_sum(unfused, group, (fp32, fp64, exact), norm=norm, eps=eps)
    # What is stored is rounded already: to round it again changes nothing.
    fused_fp32, fused_fp64 = _ffn_update(fused, block, (fp32, fp64), norm_block=block, folded=False, eps=eps)
    return GroupErrors(
        first=group[0],
        last=group[1],
        block=block,
        max_relative_error_fp32=_largest_error(fused_fp32, sum_fp32),
        max_relative_error_fp64=_largest_error(fused_fp64, sum_fp64),
        max_relative_rounding=_largest_error(fused_fp64, sum_exact),
    )


def _check(result: GroupErrors) -> None:
    for name, error, allowed in (
        ("fp32", result.max_relative_error_fp32, FP32_TOLERANCE),
        ("fp64", result.max_relative_error_fp64, FP64_TOLERANCE),
    ):
        # NaN is neither within nor over the tolerance.
        if not error <= allowed:
            raise RuntimeError(
                f"fused block {result.block} differs from the parallel sum of blocks {result.first}-{result.last} by "
                f"{error:.3g} relative in {name}, over the tolerance of {allowed:.3g}: a defect, if all weights are "
                "finite"
            )


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    # Members whose sum is zero are no division by it.
    norm = expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return ((actual - expected).norm(dim=-1) / norm).max().item()


def _parallel_sum(
    reader: TensorReader, group: Group, sides: Sequence[_Side], *, norm: Norm, eps: float
) -> list[Tensor]:
    """Sum over the members of ``group`` of FFN(norm(hidden)) [tokens, hidden], for each of ``sides``."""
    first, last = group
    folded = norm == "folded"
    totals = [torch.zeros_like(side.hidden) for side in sides]
    for member in range(first, last + 1):
        updates = _ffn_update(reader, member, sides, norm_block=member if folded else last, folded=folded, eps=eps)
        for total, update in zip(totals, updates, strict=True):
            total += update
    return totals


def _ffn_update(
    reader: TensorReader, block: int, sides: Sequence[_Side], *, norm_block: int, folded: bool, eps: float
) -> list[Tensor]:
    """FFN(norm(hidden)) of ``block`` behind the norm of ``norm_block``, for each of ``sides``.

    Folded, the scale of that norm goes into the gate and up projections of the sides that round their weights.
    """
    scale = reader.read(block_prefix(norm_block) + NORM)

    def normed(side: _Side) -> Tensor:
        behind = torch.ones_like(scale) if folded and side.stored else _rounded(scale, side.stored)
        return F.rms_norm(side.hidden, scale.shape, behind.to(side.hidden.dtype), eps)

    def scaled(rows: Tensor, stored: torch.dtype | None) -> Tensor:
        return _rounded(rows.double() * scale.double() if folded and stored else rows, stored)

    prefix, inputs = block_prefix(block), [normed(side) for side in sides]
    gates, ups = (_project(reader, prefix + name, sides, inputs, scaled) for name in (GATE, UP))
    activations = [F.silu(gate).mul_(up) for gate, up in zip(gates, ups, strict=True)]
    return _project(reader, prefix + DOWN, sides, activations, _rounded)


def _rounded(weights: Tensor, stored: torch.dtype | None) -> Tensor:
    return weights if stored is None else weights.to(stored)


def _project(
    reader: TensorReader,
    name: str,
    sides: Sequence[_Side],
    inputs: Sequence[Tensor],
    weights: Callable[[Tensor, torch.dtype | None], Tensor],
) -> list[Tensor]:
    """Every side's [tokens, in] of ``inputs`` through what ``weights`` makes of tensor ``name`` [out, in], read once.

    ``weights`` takes some of its rows and the side's ``stored``, and returns them in any data type.
    """
    outputs = [each.new_empty(each.shape[0], reader.shape(name)[0]) for each in inputs]
    start = 0
    for rows in reader.row_chunks(name, _CHUNK_BYTES):
        made = {stored: weights(rows, stored) for stored in {side.stored for side in sides}}
        for side, each, output in zip(sides, inputs, outputs, strict=True):
            output[:, start : start + len(rows)] = F.linear(each, made[side.stored].to(each.dtype))
        start += len(rows)
    return outputs
