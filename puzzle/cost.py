"""Measured costs of every subblock variant of a search space.

A variant is timed in a stack of blocks that hold nothing else, each with weights of its own, so that caches see as much
new data per block as in a real model. The time of 2N blocks less that of N, divided by N, is the time of one: what does
not grow with the number of blocks cancels. A no-op costs exactly 0. All blocks are real blocks of the model file, with
the parent's dimensions and random weights, at the workload's batch, lengths and data type.

Under tensor parallelism they are one rank's share of those blocks, alone on one device; the all-reduce that follows
each is added, measured or modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from puzzle.analytic import (
    AllReduce,
    Phase,
    PhaseTimes,
    Reduction,
    cost_table,
    phases,
    subblock_name,
    swiglu_widths,
)
from puzzle.config import CostConfig, SpaceConfig, WorkloadConfig
from puzzle.latency import Step, blocks_step, interleaved_ms, model_step, torch_dtype
from puzzle.model import stats
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    round_up_ffn_dim,
)
from puzzle.model.checkpoint import dtype_name
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import hf_config
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.shard import Shard, Subblock
from puzzle.space import attention_variants, ffn_variants
from puzzle.tables import CostTable

CACHE_BYTES = 128 * 2**20
"""Beyond the last-level cache of nearly all devices. The shorter stack has as many bytes of weights and KV cache, or as
the parent has of weights if these are fewer: it streams from memory where the parent does, and may fit a cache where
the parent fits."""
MIN_COPIES, MAX_COPIES = 2, 64
"""Blocks of the shorter stack."""
NUM_ATTEMPTS = 3
"""Measurements of a difference that keeps coming out negative, each with twice the repeats of the one before."""


def subblock_variants(parent: Architecture, space: SpaceConfig) -> tuple[Subblock, ...]:
    """Distinct attentions, then distinct FFNs, that may stand at some block.

    Raises:
        ValueError: the space does not fit the parent.
    """
    indices = range(parent.num_blocks)
    attentions = dict.fromkeys(a for index in indices for a in attention_variants(parent, index, space))
    ffns = dict.fromkeys(ffn for index in indices for ffn in ffn_variants(parent, index, space))
    return (*attentions, *ffns)


def measured_table(
    parent: Architecture,
    subblocks: Sequence[Subblock],
    *,
    workload: WorkloadConfig,
    config: CostConfig,
    device: torch.device,
    hardware: str,
    all_reduce: AllReduce,
) -> CostTable:
    """Measure every subblock, the overhead outside of the blocks, and what a merge of two FFNs saves.

    The time of a subblock that comes out at or below 0 (noise around next to nothing) is measured again with twice the
    repeats. A time or a saving that stays below 0 becomes 0 and is named in the table's ``clamped``.

    Args:
        parent: dimensions, vocabulary, sliding window.
        subblocks: variants to measure.
        workload: batch size, lengths, data type and ranks.
        config: repeats and warm-up.
        device: where to measure.
        hardware: name of the device.
        all_reduce: what an all-reduce takes over the ranks of the workload; 0 on a single one.

    Raises:
        ValueError: a subblock cannot be dealt over the ranks, or the device's memory is too small for the workload.
    """
    meter = Meter(parent=parent, workload=workload, config=config, device=device)
    reduction = Reduction(parent=parent, workload=workload, all_reduce=all_reduce)
    prefill, decode = phases(workload)
    reduction_ms = (reduction.subblock_ms(prefill), reduction.subblock_ms(decode))
    widths = swiglu_widths(subblocks)
    try:
        times = {s: meter.subblock_ms(s) for s in tqdm(subblocks, desc="subblocks", unit="variant", leave=False)}
        savings = [meter.merge_saving_ms(width) for width in tqdm(widths, desc="merges", unit="width", leave=False)]
        overhead_ms = meter.overhead_ms()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"workload: batch size {workload.batch_size} with {workload.prefill_tokens} + "
            f"{workload.generated_tokens} tokens does not fit the memory of {hardware}; lower "
            "workload.batch_size, costs.batch_sizes or the lengths"
        ) from error
    saving_ms = [median(column) for column in zip(*savings or [(0.0, 0.0)], strict=True)]
    prefill_saving_ms, decode_saving_ms = _sum(saving_ms, reduction_ms)
    return cost_table(
        parent,
        workload,
        source="measured",
        hardware=hardware,
        subblock_ms={s: ms if s.is_no_op else _sum(ms, reduction_ms) for s, ms in times.items()},
        overhead_ms=_sum(overhead_ms, (reduction.outside_ms(prefill), reduction.outside_ms(decode))),
        merge_saving_ms=(
            meter.not_below_zero(prefill_saving_ms, "ffn_merge_saving prefill_ms"),
            meter.not_below_zero(decode_saving_ms, "ffn_merge_saving decode_ms"),
        ),
        clamped=meter.clamped,
    )


def _sum(times: Sequence[float], further: Sequence[float]) -> PhaseTimes:
    return times[0] + further[0], times[1] + further[1]


@dataclass(kw_only=True)
class Meter:
    """Measures parts of one rank's share of one parent on one device, and remembers what it had to clamp.

    No all-reduce is in its times.
    """

    parent: Architecture
    workload: WorkloadConfig
    config: CostConfig
    device: torch.device
    clamped: list[str] = field(default_factory=list)

    def subblock_ms(self, subblock: Subblock) -> PhaseTimes:
        """Time of one attention or FFN, its norm and residual included."""
        if subblock.is_no_op:
            return 0.0, 0.0
        num_copies = self._num_copies(subblock)
        model = self._random_stack([subblock] * (2 * num_copies))
        blocks = list(model.model.layers)
        prefill, decode = (
            self._blocks_difference_ms(model, blocks, blocks[:num_copies], phase) for phase in phases(self.workload)
        )
        name = subblock_name(subblock)
        return (
            self.not_below_zero(prefill / num_copies, f"{name} prefill_ms"),
            self.not_below_zero(decode / num_copies, f"{name} decode_ms"),
        )

    def merge_saving_ms(self, width: int) -> PhaseTimes:
        """Time of two blocks with nothing but a SwiGLU of ``width`` less that of one with twice the width."""
        merged = FFNConfig(ffn_dim=2 * width)
        num_merged = self._num_copies(merged)
        num_apart = 2 * num_merged
        model = self._random_stack([FFNConfig(ffn_dim=width)] * num_apart + [merged] * num_merged)
        blocks = list(model.model.layers)
        prefill, decode = (
            self._blocks_difference_ms(model, blocks[:num_apart], blocks[num_apart:], phase, attempts=1)
            for phase in phases(self.workload)
        )
        return prefill / num_merged, decode / num_merged

    def overhead_ms(self) -> PhaseTimes:
        """Time of embedding, final norm and LM head: a model whose only block does nothing.

        As much memory as a stack of blocks has is read before: in a real model too, the head's weights have left the
        caches when their turn comes again.
        """
        model = random_model(self._shard.architecture, dtype=torch_dtype(self.workload), device=self.device)
        blocks_memory = torch.zeros(self._stack_bytes // 4, device=self.device)

        def read_and_run(phase: Phase) -> Step:
            step = model_step(model, self.workload, phase)
            return lambda: (blocks_memory.sum(), step())

        prefill, decode = (
            self._difference_ms(read_and_run(phase), blocks_memory.sum, phase) for phase in phases(self.workload)
        )
        return (
            self.not_below_zero(prefill, "overhead prefill_ms"),
            self.not_below_zero(decode, "overhead decode_ms"),
        )

    def not_below_zero(self, milliseconds: float, name: str) -> float:
        """``milliseconds``, or 0 where it is below, which is remembered under ``name``."""
        if milliseconds < 0:
            self.clamped.append(name)
        return max(0.0, milliseconds)

    @property
    def _shard(self) -> Shard:
        return Shard(parent=self.parent, num_ranks=self.workload.tensor_parallel)

    @property
    def _stack_bytes(self) -> int:
        size = self.workload.bytes_per_value
        return min(CACHE_BYTES, stats.weight_bytes(self.parent, size) // self.workload.tensor_parallel)

    def _num_copies(self, subblock: Subblock) -> int:
        shard, workload, size = self._shard, self.workload, self.workload.bytes_per_value
        num_cached = workload.batch_size * workload.max_context_tokens
        copy_bytes = size * (shard.num_weights(subblock) + num_cached * shard.kv_values_per_token(subblock))
        return min(MAX_COPIES, max(MIN_COPIES, -(-self._stack_bytes // copy_bytes)))

    def _random_stack(self, subblocks: Sequence[Subblock]) -> DeciLMForCausalLM:
        return random_stack(self._shard, subblocks, dtype=torch_dtype(self.workload), device=self.device)

    def _blocks_difference_ms(
        self,
        model: DeciLMForCausalLM,
        long: Sequence[DeciLMDecoderLayer],
        short: Sequence[DeciLMDecoderLayer],
        phase: Phase,
        *,
        attempts: int = NUM_ATTEMPTS,
    ) -> float:
        long_step, short_step = (blocks_step(model.model, blocks, self.workload, phase) for blocks in (long, short))
        return self._difference_ms(long_step, short_step, phase, attempts=attempts)

    def _difference_ms(self, long: Step, short: Step, phase: Phase, *, attempts: int = NUM_ATTEMPTS) -> float:
        """Median over rounds of the time of ``long`` less that of ``short``; not above 0 only after ``attempts``."""
        difference_ms = 0.0
        for attempt in range(attempts):
            samples = interleaved_ms(
                {"long": long, "short": short},
                device=self.device,
                repeats=self.config.repeats * 2**attempt,
                warmup=self.config.warmup,
                desc=phase.name,
            )
            difference_ms = median(a - b for a, b in zip(samples["long"], samples["short"], strict=True))
            if difference_ms > 0:
                break
        return difference_ms


def random_model(architecture: Architecture, *, dtype: torch.dtype, device: torch.device) -> DeciLMForCausalLM:
    """A model for timing, its weights drawn on the device itself: on the CPU a 405B block would take minutes."""
    return _with_random_weights(_meta_model(architecture, dtype), device)


def random_stack(
    shard: Shard, subblocks: Sequence[Subblock], *, dtype: torch.dtype, device: torch.device
) -> DeciLMForCausalLM:
    """One rank's share of some subblocks, each alone in a block of its own, with next to no vocabulary.

    Raises:
        ValueError: a subblock cannot be dealt over the ranks.
    """
    return _with_random_weights(meta_stack(shard, subblocks, dtype=dtype), device)


def meta_stack(shard: Shard, subblocks: Sequence[Subblock], *, dtype: torch.dtype) -> DeciLMForCausalLM:
    """:func:`random_stack` on the meta device: shapes alone, which take no memory.

    Raises:
        ValueError: a subblock cannot be dealt over the ranks.
    """
    architecture = replace(shard.architecture, vocab_size=1, blocks=tuple(_alone(shard, s) for s in subblocks))
    model = _meta_model(architecture, dtype)
    for block, subblock in zip(model.model.layers, subblocks, strict=True):
        # The format knows neither widths beside the multiples of 256 nor linear subblocks that are not square.
        for name, shape in shard.shapes(subblock).items():
            module, _, parameter = name.rpartition(".")
            empty = torch.empty(shape, dtype=dtype, device="meta")
            block.get_submodule(module).register_parameter(parameter, nn.Parameter(empty))
        if shard.num_ranks > 1 and subblock.kind == "linear":
            linear = block.self_attn or block.mlp
            linear.register_forward_pre_hook(_InputShare(shard.linear_input_dim()))
    return model


def _alone(shard: Shard, subblock: Subblock) -> BlockConfig:
    """A block with nothing but ``subblock``, as near to one rank's share as the format can say."""
    attention, ffn = NO_ATTENTION, NO_FFN
    if isinstance(subblock, AttentionConfig):
        heads = shard.num_kv_heads(subblock)
        attention = replace(subblock, num_kv_heads=heads) if heads else subblock
    else:
        width = shard.ffn_dim(subblock)
        ffn = FFNConfig(ffn_dim=round_up_ffn_dim(width)) if width else subblock
    return BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(0,))


@dataclass(frozen=True)
class _InputShare:
    """Hook that leaves a module the first ``num_channels`` of its input."""

    num_channels: int

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (arguments[0][..., : self.num_channels], *arguments[1:])


def _meta_model(architecture: Architecture, dtype: torch.dtype) -> DeciLMForCausalLM:
    with torch.device("meta"):
        return DeciLMForCausalLM(DeciLMConfig(**hf_config(architecture, dtype_name(dtype)))).to(dtype)


@torch.no_grad()
def _with_random_weights(model: DeciLMForCausalLM, device: torch.device) -> DeciLMForCausalLM:
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()
