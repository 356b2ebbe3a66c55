"""Measured costs of every subblock variant of a search space.

A variant is timed in a stack of blocks that hold nothing else, each with weights of its own, so that caches see as much
new data per block as in a real model. The time of 2N blocks less that of N, divided by N, is the time of one: what does
not grow with the number of blocks cancels. A no-op costs exactly 0. All blocks are real blocks of the model file, with
the parent's dimensions and random weights, at the workload's batch, lengths and data type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from puzzle.analytic import (
    Phase,
    PhaseTimes,
    Subblock,
    cost_table,
    kv_bytes_per_token,
    phases,
    subblock_name,
    subblock_params,
    swiglu_widths,
)
from puzzle.config import CostConfig, HardwareConfig, SpaceConfig, WorkloadConfig
from puzzle.latency import Step, blocks_step, interleaved_ms, model_step, torch_dtype
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import dtype_name
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import hf_config
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
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
COPY_BYTES = 256 * 2**20
"""Copied to measure the bandwidth."""
MATMUL_DIM = {"cpu": 1024, "cuda": 8192}
NUM_CHAINED_KERNELS = 64


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
) -> CostTable:
    """Measure every subblock, the overhead outside of the blocks, and what a merge of two FFNs saves.

    The time of a subblock that comes out at or below 0 (noise around next to nothing) is measured again with twice the
    repeats. A time or a saving that stays below 0 becomes 0 and is named in the table's ``clamped``.

    Args:
        parent: dimensions, vocabulary, sliding window.
        subblocks: variants to measure.
        workload: batch size, lengths and data type.
        config: repeats and warm-up.
        device: where to measure.
    """
    meter = Meter(parent=parent, workload=workload, config=config, device=device)
    widths = swiglu_widths(subblocks)
    times = {s: meter.subblock_ms(s) for s in tqdm(subblocks, desc="subblocks", unit="variant", leave=False)}
    savings = [meter.merge_saving_ms(width) for width in tqdm(widths, desc="merges", unit="width", leave=False)]
    prefill_ms, decode_ms = (median(column) for column in zip(*savings or [(0.0, 0.0)], strict=True))
    return cost_table(
        parent,
        workload,
        subblock_ms=times,
        overhead_ms=meter.overhead_ms(),
        merge_saving_ms=(
            meter.not_below_zero(prefill_ms, "ffn_merge_saving prefill_ms"),
            meter.not_below_zero(decode_ms, "ffn_merge_saving decode_ms"),
        ),
        clamped=meter.clamped,
    )


@dataclass(kw_only=True)
class Meter:
    """Measures parts of one parent on one device, and remembers what it had to clamp."""

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
        model = self._random_stack([_alone(subblock)] * (2 * num_copies))
        blocks = list(model.model.layers)
        times = []
        for phase in phases(self.workload):
            for attempt in range(NUM_ATTEMPTS):
                repeats = self.config.repeats * 2**attempt
                stack_ms = self._difference_ms(model, blocks, blocks[:num_copies], phase, repeats)
                if stack_ms > 0:
                    break
            times.append(self.not_below_zero(stack_ms / num_copies, f"{subblock_name(subblock)} {phase.name}_ms"))
        return times[0], times[1]

    def merge_saving_ms(self, width: int) -> PhaseTimes:
        """Time of two blocks with nothing but a SwiGLU of ``width`` less that of one with twice the width."""
        merged = FFNConfig(ffn_dim=2 * width)
        num_merged = self._num_copies(merged)
        num_apart = 2 * num_merged
        model = self._random_stack([_alone(FFNConfig(ffn_dim=width))] * num_apart + [_alone(merged)] * num_merged)
        blocks = list(model.model.layers)
        prefill, decode = (
            self._difference_ms(model, blocks[:num_apart], blocks[num_apart:], phase, self.config.repeats)
            for phase in phases(self.workload)
        )
        return prefill / num_merged, decode / num_merged

    def overhead_ms(self) -> PhaseTimes:
        """Time of embedding, final norm and LM head: a model whose only block does nothing."""
        empty = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(0,))
        model = random_model(self.parent.with_blocks((empty,)), dtype=torch_dtype(self.workload), device=self.device)
        steps = {phase.name: model_step(model, self.workload, phase) for phase in phases(self.workload)}
        samples = interleaved_ms(
            steps, device=self.device, repeats=self.config.repeats, warmup=self.config.warmup, desc="overhead"
        )
        return median(samples["prefill"]), median(samples["decode"])

    def not_below_zero(self, milliseconds: float, name: str) -> float:
        """``milliseconds``, or 0 where it is below, which is remembered under ``name``."""
        if milliseconds < 0:
            self.clamped.append(name)
        return max(0.0, milliseconds)

    def _num_copies(self, subblock: Subblock) -> int:
        parent, workload, size = self.parent, self.workload, self.workload.bytes_per_value
        num_cached = workload.batch_size * workload.max_context_tokens
        copy_bytes = size * subblock_params(parent, subblock) + num_cached * kv_bytes_per_token(parent, subblock, size)
        wanted_bytes = min(CACHE_BYTES, stats.weight_bytes(parent, size))
        return min(MAX_COPIES, max(MIN_COPIES, -(-wanted_bytes // copy_bytes)))

    def _random_stack(self, blocks: Sequence[BlockConfig]) -> DeciLMForCausalLM:
        """The blocks with next to no vocabulary."""
        architecture = replace(self.parent, vocab_size=1, blocks=tuple(blocks))
        return random_model(architecture, dtype=torch_dtype(self.workload), device=self.device)

    def _difference_ms(
        self,
        model: DeciLMForCausalLM,
        long: Sequence[DeciLMDecoderLayer],
        short: Sequence[DeciLMDecoderLayer],
        phase: Phase,
        repeats: int,
    ) -> float:
        """Median over rounds of the time of blocks ``long`` less that of blocks ``short``."""
        steps = {
            name: blocks_step(model.model, blocks, self.workload, phase)
            for name, blocks in (("long", long), ("short", short))
        }
        samples = interleaved_ms(steps, device=self.device, repeats=repeats, warmup=self.config.warmup, desc=phase.name)
        return median(a - b for a, b in zip(samples["long"], samples["short"], strict=True))


def _alone(subblock: Subblock) -> BlockConfig:
    """A block with nothing but ``subblock``."""
    if isinstance(subblock, AttentionConfig):
        return BlockConfig(attention=subblock, ffn=NO_FFN, parent_block_indices=(0,))
    return BlockConfig(attention=NO_ATTENTION, ffn=subblock, parent_block_indices=(0,))


@torch.no_grad()
def random_model(architecture: Architecture, *, dtype: torch.dtype, device: torch.device) -> DeciLMForCausalLM:
    """A model for timing, its weights drawn on the device itself: on the CPU a 405B block would take minutes."""
    with torch.device("meta"):
        model = DeciLMForCausalLM(DeciLMConfig(**hf_config(architecture, dtype_name(dtype))))
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def calibrate(
    hardware: HardwareConfig, *, dtype: torch.dtype, device: torch.device, config: CostConfig
) -> HardwareConfig:
    """``hardware`` with its null rates measured here.

    Matrix products: one square product. Bandwidth: a copy beyond all caches, read and write counted. Kernel launch: a
    chain of operators on next to nothing.
    """
    dim = MATMUL_DIM[device.type]
    # Random numbers: GPUs draw less power on zeros, and clock higher.
    matrix = torch.rand(dim, dim, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    product = torch.empty_like(matrix)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tiny = torch.zeros(8, dtype=dtype, device=device)

    def chain() -> None:
        for _ in range(NUM_CHAINED_KERNELS):
            tiny.add_(1)

    work: dict[str, tuple[Step, Callable[[float], float]]] = {
        "flops_per_s": (lambda: torch.matmul(matrix, matrix, out=product), lambda s: 2 * dim**3 / s),
        "bytes_per_s": (lambda: target.copy_(source), lambda s: 2 * COPY_BYTES / s),
        "kernel_launch_s": (chain, lambda s: s / NUM_CHAINED_KERNELS),
    }
    missing = {name: step for name, (step, _) in work.items() if getattr(hardware, name) is None}
    samples = interleaved_ms(missing, device=device, repeats=config.repeats, warmup=config.warmup, desc="calibrate")
    rates: dict[str, Any] = {name: work[name][1](median(values) / 1e3) for name, values in samples.items()}
    return replace(hardware, **rates)
