"""Costs by arithmetic: parameters and bytes, and a roofline for time. Torch-free.

A subblock is the operators that the model file issues, one after another. Each takes ``max(flops / flops_per_s, bytes /
bytes_per_s) + kernel_launch_s``, where the bytes are all that it reads and writes: weights, KV cache and activations.
Under tensor parallelism the sizes are those of one rank, and an all-reduce follows. The table has the shape of a
measured one, so that a search can do without the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from distill.config import require
from puzzle.config import HardwareConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.shard import Shard, Subblock
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost

NUM_NORM_KERNELS = {"float32": 6, "bfloat16": 8}
"""Two casts more where the variance is not computed in the data type of the activations."""
NORM_BYTES = {"float32": 28, "bfloat16": 36}
"""Read and written per channel by the operators of one norm, which work in fp32: square, mean, two products and, in
bfloat16, two casts."""
NUM_ROTATION_KERNELS = 5
ROTATION_VALUES = 10
"""Read and written per channel by the operators of one rotation: two products, negation, concatenation, sum."""

PhaseTimes = tuple[float, float]
"""Milliseconds of prefill and decode."""
AllReduce = Callable[[int], float]
"""Bytes that every rank contributes -> milliseconds until all have the sum."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Shape of the work of one forward pass."""

    name: Literal["prefill", "decode"]
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
class Work:
    """One operator, or several that move their bytes together."""

    flops: float = 0.0
    num_bytes: float = 0.0
    num_kernels: int = 1


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
        way_out = "give numbers, or take hardware@costs.hardware=here, which is calibrated"
        return cls(**_rates(hardware, ("flops_per_s", "bytes_per_s", "kernel_launch_s"), way_out))

    def milliseconds(self, works: Iterable[Work]) -> float:
        """Time of operators that run one after another."""
        return 1e3 * sum(
            max(work.flops / self.flops_per_s, work.num_bytes / self.bytes_per_s)
            + work.num_kernels * self.kernel_launch_s
            for work in works
        )


def modelled_all_reduce(hardware: HardwareConfig, num_ranks: int) -> AllReduce:
    """All-reduce in a ring: every rank sends ``2 (num_ranks - 1) / num_ranks`` times its bytes, after a fixed time. One
    rank has nothing to reduce.

    Raises:
        ValueError: there are several ranks and a rate of ``hardware`` is null.
    """
    if num_ranks == 1:
        return lambda num_bytes: 0.0
    way_out = f"give numbers, or take hardware@costs.hardware=here and start {num_ranks} processes with torchrun"
    rates = _rates(hardware, ("all_reduce_s", "all_reduce_bytes_per_s"), way_out)
    seconds_per_byte = 2 * (num_ranks - 1) / num_ranks / rates["all_reduce_bytes_per_s"]
    return lambda num_bytes: 1e3 * (rates["all_reduce_s"] + num_bytes * seconds_per_byte)


def _rates(hardware: HardwareConfig, names: Sequence[str], way_out: str) -> dict[str, float]:
    rates = {name: getattr(hardware, name) for name in names}
    missing = [name for name, rate in rates.items() if rate is None]
    of = f" of {hardware.name}" if hardware.name else ""
    require(not missing, f"costs.hardware: {', '.join(missing)}{of} is null; {way_out}")
    return rates


@dataclass(frozen=True, kw_only=True)
class Operators:
    """The operators of the parts of one rank's share, at one workload and in one phase."""

    shard: Shard
    workload: WorkloadConfig
    phase: Phase

    @property
    def num_tokens(self) -> int:
        """Tokens that enter, over all sequences."""
        return self.workload.batch_size * self.phase.new_tokens

    def subblock(self, subblock: Subblock) -> list[Work]:
        """One attention or FFN, its norm and residual included."""
        assert not subblock.is_no_op
        hidden_dim = self.shard.parent.hidden_dim
        if isinstance(subblock, AttentionConfig) and subblock.num_kv_heads is not None:
            inner = self._attention(subblock)
        elif isinstance(subblock, FFNConfig) and subblock.ffn_dim is not None:
            inner = self._swiglu(self.shard.ffn_dim(subblock))
        else:
            inner = [self._product(self.num_tokens, self.shard.linear_input_dim(), hidden_dim)]
        return [self._norm(self.num_tokens, hidden_dim), *inner, self._pointwise(3 * self.num_tokens * hidden_dim)]

    def outside(self) -> list[Work]:
        """Embedding of the new tokens; final norm and head at the last position of every sequence."""
        architecture, batch_size = self.shard.architecture, self.workload.batch_size
        return [
            self._pointwise(2 * self.num_tokens * architecture.hidden_dim),
            self._norm(batch_size, architecture.hidden_dim),
            self._product(batch_size, architecture.hidden_dim, architecture.vocab_size),
        ]

    def _attention(self, attention: AttentionConfig) -> list[Work]:
        """Projections, head norms, rotations, cache writes, attention over the cache, output projection."""
        architecture, num_tokens = self.shard.architecture, self.num_tokens
        head_dim, hidden_dim = architecture.head_dim, architecture.hidden_dim
        window = architecture.sliding_window or self.phase.context_tokens
        query_dim = architecture.num_heads * head_dim
        kv_dim = self.shard.num_kv_heads(attention) * head_dim
        num_cached = self.workload.batch_size * min(self.phase.context_tokens, window)
        num_written = min(num_tokens, num_cached)
        attend = Work(
            flops=4 * num_tokens * query_dim * mean_attended_tokens(self.phase, window),
            num_bytes=self._bytes(2 * num_tokens * query_dim + 2 * num_cached * kv_dim),
        )
        return [
            *(self._product(num_tokens, hidden_dim, dim) for dim in (query_dim, kv_dim, kv_dim)),
            *(self._norm(num_tokens, dim, head_dim) for dim in (query_dim, kv_dim) if architecture.qk_norm),
            *(self._pointwise(ROTATION_VALUES * num_tokens * d, NUM_ROTATION_KERNELS) for d in (query_dim, kv_dim)),
            self._pointwise(4 * num_written * kv_dim, 2),
            attend,
            self._product(num_tokens, query_dim, hidden_dim),
        ]

    def _swiglu(self, width: int) -> list[Work]:
        """Gate and up projection, activation, gating, down projection."""
        hidden_dim, num_tokens = self.shard.parent.hidden_dim, self.num_tokens
        return [
            *(self._product(num_tokens, hidden_dim, width) for _ in range(2)),
            *(self._pointwise(values * num_tokens * width) for values in (2, 3)),
            self._product(num_tokens, width, hidden_dim),
        ]

    def _product(self, num_rows: int, input_dim: int, output_dim: int) -> Work:
        num_values = input_dim * output_dim + num_rows * (input_dim + output_dim)
        return Work(flops=2 * num_rows * input_dim * output_dim, num_bytes=self._bytes(num_values))

    def _norm(self, num_rows: int, dim: int, num_weights: int | None = None) -> Work:
        dtype = self.workload.dtype
        num_bytes = NORM_BYTES[dtype] * num_rows * dim + self._bytes(num_weights or dim)
        return Work(num_bytes=num_bytes, num_kernels=NUM_NORM_KERNELS[dtype])

    def _pointwise(self, num_values: int, num_kernels: int = 1) -> Work:
        return Work(num_bytes=self._bytes(num_values), num_kernels=num_kernels)

    def _bytes(self, num_values: int) -> int:
        return self.workload.bytes_per_value * num_values


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What tensor parallelism adds to the work of one rank."""

    parent: Architecture
    workload: WorkloadConfig
    all_reduce: AllReduce

    def subblock_ms(self, phase: Phase) -> float:
        """The all-reduce of what one subblock adds to the residual stream of all new tokens."""
        return self.all_reduce(self._hidden_bytes(phase))

    def outside_ms(self, phase: Phase) -> float:
        """The all-reduce of the embeddings, and the gathering of the last positions' logits, which goes half of the way
        of an all-reduce."""
        return self.all_reduce(self._hidden_bytes(phase)) + self.all_reduce(self._logit_bytes() // 2)

    def sizes(self) -> set[int]:
        """Bytes of all the all-reduces that the methods above ask for."""
        return {self._logit_bytes() // 2, *(self._hidden_bytes(phase) for phase in phases(self.workload))}

    def _hidden_bytes(self, phase: Phase) -> int:
        num_tokens = self.workload.batch_size * phase.new_tokens
        return self.workload.bytes_per_value * num_tokens * self.parent.hidden_dim

    def _logit_bytes(self) -> int:
        return self.workload.bytes_per_value * self.workload.batch_size * self.parent.vocab_size


@dataclass(frozen=True, kw_only=True)
class AnalyticCosts:
    """Times of the subblocks of one parent at one workload on one device, as one rank sees them."""

    parent: Architecture
    workload: WorkloadConfig
    roofline: Roofline
    all_reduce: AllReduce

    @property
    def reduction(self) -> Reduction:
        """The part that is not computation."""
        return Reduction(parent=self.parent, workload=self.workload, all_reduce=self.all_reduce)

    def subblock_ms(self, subblock: Subblock, phase: Phase) -> float:
        """One attention or FFN, its norm, residual and all-reduce included; 0 for a no-op."""
        if subblock.is_no_op:
            return 0.0
        computed_ms = self.roofline.milliseconds(self._operators(phase).subblock(subblock))
        return computed_ms + self.reduction.subblock_ms(phase)

    def overhead_ms(self, phase: Phase) -> float:
        """Embedding of the new tokens; final norm and head at the last position of every sequence."""
        return self.roofline.milliseconds(self._operators(phase).outside()) + self.reduction.outside_ms(phase)

    def merge_saving_ms(self, subblocks: Sequence[Subblock], phase: Phase) -> float:
        """Median over the SwiGLU widths of what two neighbours take more than one FFN of twice the width."""
        savings = [
            2 * self.subblock_ms(FFNConfig(ffn_dim=width), phase)
            - self.subblock_ms(FFNConfig(ffn_dim=2 * width), phase)
            for width in swiglu_widths(subblocks)
        ]
        return max(0.0, median(savings)) if savings else 0.0

    def _operators(self, phase: Phase) -> Operators:
        shard = Shard(parent=self.parent, num_ranks=self.workload.tensor_parallel)
        return Operators(shard=shard, workload=self.workload, phase=phase)


def analytic_table(
    parent: Architecture, subblocks: Sequence[Subblock], *, workload: WorkloadConfig, hardware: HardwareConfig
) -> CostTable:
    """Costs of the given subblock variants of ``parent``.

    Raises:
        ValueError: ``hardware`` lacks a rate, or a subblock cannot be dealt over the ranks of the workload.
    """
    costs = AnalyticCosts(
        parent=parent,
        workload=workload,
        roofline=Roofline.of(hardware),
        all_reduce=modelled_all_reduce(hardware, workload.tensor_parallel),
    )
    prefill, decode = phases(workload)
    return cost_table(
        parent,
        workload,
        source="analytic",
        hardware=hardware.name or "this device",
        subblock_ms={s: (costs.subblock_ms(s, prefill), costs.subblock_ms(s, decode)) for s in subblocks},
        overhead_ms=(costs.overhead_ms(prefill), costs.overhead_ms(decode)),
        merge_saving_ms=(costs.merge_saving_ms(subblocks, prefill), costs.merge_saving_ms(subblocks, decode)),
    )


def cost_table(
    parent: Architecture,
    workload: WorkloadConfig,
    *,
    source: str,
    hardware: str,
    subblock_ms: Mapping[Subblock, PhaseTimes],
    overhead_ms: PhaseTimes,
    merge_saving_ms: PhaseTimes,
    clamped: Sequence[str] = (),
) -> CostTable:
    """Times, from wherever, with the parameters and bytes that follow from the architecture.

    Args:
        parent: the parent of all subblocks.
        workload: batch size, lengths, data type and ranks that the times are of.
        source: measured, analytic or vllm.
        hardware: name of the device.
        subblock_ms: milliseconds of every subblock variant, all-reduce included, as one rank sees them.
        overhead_ms: milliseconds of embedding, final norm and head.
        merge_saving_ms: what a merge of two FFNs saves, >= 0.
        clamped: times that came out below 0 and stand as 0.

    Raises:
        ValueError: a subblock cannot be dealt over the ranks of the workload.
    """
    size, shard = workload.bytes_per_value, Shard(parent=parent, num_ranks=workload.tensor_parallel)
    rows = tuple(
        SubblockCost(
            subblock="attention" if isinstance(subblock, AttentionConfig) else "ffn",
            variant=subblock.name,
            prefill_ms=times[0],
            decode_ms=times[1],
            params=subblock_params(parent, subblock),
            weight_bytes=shard.num_weights(subblock) * size,
            kv_bytes_per_token=shard.kv_values_per_token(subblock) * size,
        )
        for subblock, times in subblock_ms.items()
    )
    return CostTable(
        source=source,
        hardware=f"{workload.tensor_parallel} x {hardware}" if workload.tensor_parallel > 1 else hardware,
        workload=workload,
        kv_tokens=min(workload.max_context_tokens, parent.sliding_window or workload.max_context_tokens),
        overhead=OverheadCost(
            prefill_ms=overhead_ms[0],
            decode_ms=overhead_ms[1],
            params=stats.other_params(parent),
            weight_bytes=shard.num_other_weights() * size,
        ),
        subblocks=rows,
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
    """Parameters of one whole subblock, its norm included."""
    if isinstance(subblock, AttentionConfig):
        return stats.attention_params(parent, subblock)
    return stats.ffn_params(parent, subblock)
