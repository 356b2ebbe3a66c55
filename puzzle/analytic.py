"""Costs by arithmetic: parameters and bytes, and a roofline for time. Torch-free.

A subblock takes ``max(flops / flops_per_s, bytes / bytes_per_s) + kernels * kernel_launch_s``. The bytes are the
weights once, the KV cache, and activations as one pass over inputs, inner values and outputs; the kernels are the
operators that the model file issues. The table has the shape of a measured one, so that a search can do without the
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from distill.config import require
from puzzle.config import HardwareConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost

NUM_NORM_KERNELS = {"float32": 6, "bfloat16": 8}
"""Two casts more where the variance is not computed in the data type of the activations."""
NUM_ATTENTION_KERNELS = {"gqa": 19, "linear": 2, "no_op": 0}
"""Besides the norm. gqa: three projections, two rotations of five operators, two cache writes, attention, layout,
output, residual; linear: product, residual."""
NUM_FFN_KERNELS = {"swiglu": 6, "linear": 2, "no_op": 0}
"""Besides the norm. swiglu: three products, activation, gating, residual."""
NUM_OTHER_KERNELS = 2
"""Embedding and head, besides the final norm."""

Subblock = AttentionConfig | FFNConfig
PhaseTimes = tuple[float, float]
"""Milliseconds of prefill and decode."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Shape of the work of one forward pass."""

    name: str
    new_tokens: int
    """Tokens per sequence that enter."""
    context_tokens: int
    """Tokens per sequence in the KV cache afterwards."""


def phases(workload: WorkloadConfig) -> tuple[Phase, Phase]:
    """Prefill, and the decode step in the middle of the generation."""
    context_tokens = workload.prefill_tokens + max(1, workload.generated_tokens // 2)
    return (
        Phase(name="prefill", new_tokens=workload.prefill_tokens, context_tokens=workload.prefill_tokens),
        Phase(name="decode", new_tokens=1, context_tokens=context_tokens),
    )


def mean_attended_tokens(phase: Phase, window: int) -> int:
    """Tokens that a new token attends to, itself included, on average over the new tokens."""
    first = phase.context_tokens - phase.new_tokens + 1
    num_growing = max(0, min(phase.context_tokens, window) - first + 1)
    total = num_growing * (2 * first + num_growing - 1) // 2 + (phase.new_tokens - num_growing) * window
    return round(total / phase.new_tokens)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Rates of a device."""

    flops_per_s: float
    bytes_per_s: float
    kernel_launch_s: float

    @classmethod
    def of(cls, hardware: HardwareConfig) -> Roofline:
        """The rates of ``hardware``.

        Raises:
            ValueError: one of them is null.
        """
        rates = {name: getattr(hardware, name) for name in ("flops_per_s", "bytes_per_s", "kernel_launch_s")}
        missing = [name for name, rate in rates.items() if rate is None]
        require(
            not missing,
            f"costs.hardware: {', '.join(missing)} of {hardware.name or 'this device'} is null; "
            "give a number or calibrate",
        )
        return cls(**rates)

    def milliseconds(self, *, flops: float, num_bytes: float, num_kernels: int) -> float:
        """Time of some work."""
        seconds = max(flops / self.flops_per_s, num_bytes / self.bytes_per_s) + num_kernels * self.kernel_launch_s
        return seconds * 1e3


@dataclass(frozen=True, kw_only=True)
class AnalyticCosts:
    """Times of the subblocks of one parent at one workload on one device."""

    parent: Architecture
    workload: WorkloadConfig
    roofline: Roofline

    def subblock_ms(self, subblock: Subblock, phase: Phase) -> float:
        """One attention or FFN, its norm and residual included; 0 for a no-op."""
        if subblock.is_no_op:
            return 0.0
        parent, size = self.parent, self.workload.bytes_per_value
        num_tokens = self.workload.batch_size * phase.new_tokens
        window = parent.sliding_window or phase.context_tokens
        num_cached = self.workload.batch_size * min(phase.context_tokens, window)
        if isinstance(subblock, AttentionConfig):
            num_kernels = NUM_ATTENTION_KERNELS[subblock.kind]
            flops = stats.attention_flops_per_token(parent, subblock, mean_attended_tokens(phase, window))
            num_heads = parent.num_heads + subblock.num_kv_heads if subblock.num_kv_heads else 0
            inner_dim = 2 * num_heads * parent.head_dim
        else:
            num_kernels = NUM_FFN_KERNELS[subblock.kind]
            flops = stats.ffn_flops_per_token(parent, subblock)
            inner_dim = 3 * (subblock.ffn_dim or 0)
        activations = num_tokens * (2 * parent.hidden_dim + inner_dim)
        cache_bytes = num_cached * kv_bytes_per_token(parent, subblock, size)
        return self.roofline.milliseconds(
            flops=num_tokens * flops,
            num_bytes=size * (subblock_params(parent, subblock) + activations) + cache_bytes,
            num_kernels=num_kernels + NUM_NORM_KERNELS[self.workload.dtype],
        )

    def overhead_ms(self, phase: Phase) -> float:
        """Embedding of the new tokens; final norm and head at the last position of every sequence."""
        parent, batch_size = self.parent, self.workload.batch_size
        head_values = parent.vocab_size * parent.hidden_dim
        embedded = batch_size * phase.new_tokens * 2 * parent.hidden_dim
        logits = batch_size * (3 * parent.hidden_dim + parent.vocab_size)
        return self.roofline.milliseconds(
            flops=2 * batch_size * head_values,
            num_bytes=self.workload.bytes_per_value * (head_values + embedded + logits),
            num_kernels=NUM_OTHER_KERNELS + NUM_NORM_KERNELS[self.workload.dtype],
        )

    def merge_saving_ms(self, subblocks: Sequence[Subblock], phase: Phase) -> float:
        """Median over the SwiGLU widths of what two neighbours take more than one FFN of twice the width."""
        savings = [
            2 * self.subblock_ms(FFNConfig(ffn_dim=width), phase)
            - self.subblock_ms(FFNConfig(ffn_dim=2 * width), phase)
            for width in swiglu_widths(subblocks)
        ]
        return median(savings) if savings else 0.0


def analytic_table(
    parent: Architecture, subblocks: Sequence[Subblock], *, workload: WorkloadConfig, hardware: HardwareConfig
) -> CostTable:
    """Costs of the given subblock variants of ``parent``.

    Raises:
        ValueError: ``hardware`` lacks a rate.
    """
    costs = AnalyticCosts(parent=parent, workload=workload, roofline=Roofline.of(hardware))
    prefill, decode = phases(workload)
    return cost_table(
        parent,
        workload,
        subblock_ms={s: (costs.subblock_ms(s, prefill), costs.subblock_ms(s, decode)) for s in subblocks},
        overhead_ms=(costs.overhead_ms(prefill), costs.overhead_ms(decode)),
        merge_saving_ms=(costs.merge_saving_ms(subblocks, prefill), costs.merge_saving_ms(subblocks, decode)),
    )


def cost_table(
    parent: Architecture,
    workload: WorkloadConfig,
    *,
    subblock_ms: Mapping[Subblock, PhaseTimes],
    overhead_ms: PhaseTimes,
    merge_saving_ms: PhaseTimes,
    clamped: Sequence[str] = (),
) -> CostTable:
    """Times, from wherever, with the parameters and bytes that follow from the architecture."""
    size = workload.bytes_per_value
    rows = []
    for subblock, times in subblock_ms.items():
        is_attention = isinstance(subblock, AttentionConfig)
        params = subblock_params(parent, subblock)
        rows.append(
            SubblockCost(
                subblock="attention" if is_attention else "ffn",
                variant=subblock.name,
                prefill_ms=times[0],
                decode_ms=times[1],
                params=params,
                weight_bytes=params * size,
                kv_bytes_per_token=kv_bytes_per_token(parent, subblock, size),
            )
        )
    other_params = stats.other_params(parent)
    return CostTable(
        workload=workload,
        kv_tokens=min(workload.max_context_tokens, parent.sliding_window or workload.max_context_tokens),
        overhead=OverheadCost(
            prefill_ms=overhead_ms[0],
            decode_ms=overhead_ms[1],
            params=other_params,
            weight_bytes=other_params * size,
        ),
        subblocks=tuple(rows),
        ffn_merge_saving=MergeSaving(prefill_ms=merge_saving_ms[0], decode_ms=merge_saving_ms[1]),
        clamped=tuple(clamped),
    )


def swiglu_widths(subblocks: Sequence[Subblock]) -> list[int]:
    """Channels of the SwiGLU FFNs among ``subblocks``."""
    return [s.ffn_dim for s in subblocks if isinstance(s, FFNConfig) and s.ffn_dim is not None]


def subblock_name(subblock: Subblock) -> str:
    """``attention kv2``, ``ffn w512``."""
    return f"{'attention' if isinstance(subblock, AttentionConfig) else 'ffn'} {subblock.name}"


def subblock_params(parent: Architecture, subblock: Subblock) -> int:
    """Parameters of one subblock, its norm included."""
    if isinstance(subblock, AttentionConfig):
        return stats.attention_params(parent, subblock)
    return stats.ffn_params(parent, subblock)


def kv_bytes_per_token(parent: Architecture, subblock: Subblock, bytes_per_value: int) -> int:
    """Bytes that one subblock adds to the KV cache per token and sequence."""
    if isinstance(subblock, AttentionConfig):
        return stats.attention_kv_bytes_per_token(parent, subblock, bytes_per_value)
    return 0
