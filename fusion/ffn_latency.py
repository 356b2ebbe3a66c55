"""What FFNs of the widths that fusion is about take: their computation by measurement, the all-reduce by a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import require
from fusion.group_scores import attention_free_blocks
from fusion.group_table import FFNLatency
from fusion.grouping import Group, group_width
from puzzle.analytic import Phase, PhaseTimes, Reduction, modelled_all_reduce, phases
from puzzle.config import HardwareConfig, WorkloadConfig
from puzzle.cost import CACHE_BYTES, MAX_COPIES, MIN_COPIES, NUM_ATTEMPTS, meta_stack
from puzzle.latency import Step, interleaved_ms, torch_dtype
from puzzle.model import stats
from puzzle.model.architecture import Architecture, FFNConfig
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.shard import Shard


def timed_widths(architecture: Architecture, groups: Sequence[Group], *, num_widths: int) -> tuple[int, ...]:
    """FFN widths to time, rising: the narrowest member, the widest group, and between them widths that do occur.

    Each further width is the one that is, as a ratio, farthest from all that are taken, so that they come near to a
    geometric series. Where no more than ``num_widths`` occur all of them are taken, and nothing is interpolated.

    Raises:
        ValueError: ``num_widths`` is 1: what fusion saves takes two.
    """
    require(num_widths >= 2, f"group_scores.num_widths={num_widths}: a member and a group are two widths; raise it")
    blocks = architecture.blocks
    members = {blocks[index].ffn.ffn_dim or 0 for index in attention_free_blocks(architecture)}
    left = members | {group_width(architecture, group) for group in groups}
    taken = {min(left), max(left)}
    left -= taken
    while left and len(taken) < num_widths:
        # The width itself settles ties, so that the choice does not hang on the order of a set.
        farthest = max(left, key=lambda width: (min(abs(math.log(width / other)) for other in taken), width))
        taken.add(farthest)
        left.remove(farthest)
    return tuple(sorted(taken))


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Blocks with nothing but an FFN of one width. Twice as many as count: the shorter half is subtracted."""

    blocks: tuple[DeciLMDecoderLayer, ...]

    @property
    def num_copies(self) -> int:
        """Blocks of the shorter half."""
        return len(self.blocks) // 2

    def steps(self, hidden: Tensor) -> tuple[Step, Step]:
        """Step of all blocks, and of the first half of them, on ``hidden`` [batch, new tokens, hidden]."""
        return _step(self.blocks, hidden), _step(self.blocks[: self.num_copies], hidden)


def _step(blocks: Sequence[DeciLMDecoderLayer], hidden: Tensor) -> Step:
    def step() -> Tensor:
        output = hidden
        for block in blocks:
            output = block(output)
        return output

    return step


def measure_ffns(
    architecture: Architecture,
    widths: Sequence[int],
    *,
    workload: WorkloadConfig,
    device: torch.device,
    repeats: int,
    warmup: int,
    hardware: str,
) -> tuple[tuple[FFNLatency, ...], tuple[str, ...]]:
    """Time FFNs of ``widths``, each as :class:`puzzle.cost.Meter` does, but all of them in turns.

    Savings are small differences between widths, which drift between one width's measurement and the next would hide.
    The time of 2N blocks less that of N, divided by N, is the time of one; N blocks have at least as many bytes as
    caches have, or as the model. The matrices of all stacks are views of the same random weights, so that memory holds
    those of the largest stack alone. Nothing is smoothed. A time that comes out at or below 0 is measured again with
    twice the repeats.

    Args:
        architecture: hidden size and the model's own size.
        widths: channels of the whole FFN, each a multiple of the workload's ranks.
        workload: batch size, lengths, data type and ranks. With several ranks the time is that of one rank's share,
            without the all-reduce, which :func:`all_reduce_ms` models.
        device: where to measure.
        repeats: timed rounds, of which the median counts.
        warmup: rounds before.
        hardware: name of the device.

    Returns:
        Latencies by rising width, and the names of times that stayed below 0 and stand as 0.

    Raises:
        ValueError: a width cannot be dealt over the ranks; the device's memory is too small for the workload.
    """
    shard = Shard(parent=architecture, num_ranks=workload.tensor_parallel)
    clamped: list[str] = []
    rounds = {"device": device, "repeats": repeats, "warmup": warmup}
    try:
        stacks = _stacks(shard, sorted(widths), workload, device)
        times = {phase.name: _subblock_ms(stacks, workload, phase, rounds, clamped) for phase in phases(workload)}
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"group_scores: FFNs of up to {max(widths)} channels with workload.batch_size={workload.batch_size} and "
            f"workload.prefill_tokens={workload.prefill_tokens} do not fit the memory of {hardware}; lower these, or "
            "group_scores.max_members"
        ) from error
    latencies = tuple(
        FFNLatency(ffn_dim=width, prefill_ms=times["prefill"][width], decode_ms=times["decode"][width])
        for width in stacks
    )
    return latencies, tuple(clamped)


def _stacks(shard: Shard, widths: Sequence[int], workload: WorkloadConfig, device: torch.device) -> dict[int, _Stack]:
    """A stack of every width, their matrices views of the widest ones'."""
    size, dtype = workload.bytes_per_value, torch_dtype(workload)
    model_bytes = stats.weight_bytes(shard.parent, size) // shard.num_ranks
    ffns = {width: FFNConfig(ffn_dim=width) for width in widths}
    ffn_bytes = {width: shard.num_weights(ffn) * size for width, ffn in ffns.items()}
    num_copies = {
        width: min(MAX_COPIES, max(MIN_COPIES, -(-min(CACHE_BYTES, model_bytes) // num_bytes)))
        for width, num_bytes in ffn_bytes.items()
    }
    num_values = max(2 * num_copies[width] * shard.num_weights(ffn) for width, ffn in ffns.items())
    pool = torch.empty(num_values, dtype=dtype, device=device)
    pool.normal_(0.0, 0.02, generator=torch.Generator(device).manual_seed(0))
    stacks = {}
    for width, ffn in ffns.items():
        model = meta_stack(shard, [ffn] * (2 * num_copies[width]), dtype=dtype)
        model.load_state_dict(dict(_tensors(model, pool)), assign=True)
        stacks[width] = _Stack(blocks=tuple(model.eval().model.layers))
    return stacks


def _tensors(model: DeciLMForCausalLM, pool: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors for a model on the meta device: the blocks' matrices as consecutive parts of ``pool``, all else ones."""
    start = 0
    matrices = {name for name, parameter in model.model.layers.named_parameters("model.layers") if parameter.ndim == 2}
    for name, empty in model.state_dict().items():
        if name in matrices:
            yield name, nn.Parameter(pool[start : start + empty.numel()].view(empty.shape), requires_grad=False)
            start += empty.numel()
        else:
            yield name, nn.Parameter(torch.ones_like(empty, device=pool.device), requires_grad=False)


def _subblock_ms(
    stacks: Mapping[int, _Stack], workload: WorkloadConfig, phase: Phase, rounds: dict[str, Any], clamped: list[str]
) -> dict[int, float]:
    """Milliseconds of one FFN by width; what stays below 0 is named in ``clamped``."""
    hidden = _hidden(next(iter(stacks.values())), workload, phase)
    steps = {width: stack.steps(hidden) for width, stack in stacks.items()}
    found: dict[int, float] = {}
    for attempt in range(NUM_ATTEMPTS):
        left = [width for width in stacks if found.get(width, 0.0) <= 0]
        if not left:
            break
        named = {f"{width} {part}": steps[width][part] for width in left for part in (0, 1)}
        samples = interleaved_ms(named, **{**rounds, "repeats": rounds["repeats"] * 2**attempt}, desc=phase.name)
        for width in left:
            differences = (a - b for a, b in zip(samples[f"{width} 0"], samples[f"{width} 1"], strict=True))
            found[width] = median(differences) / stacks[width].num_copies
    clamped.extend(f"ffn w{width} {phase.name}_ms" for width, milliseconds in found.items() if milliseconds < 0)
    return {width: max(0.0, milliseconds) for width, milliseconds in found.items()}


def _hidden(stack: _Stack, workload: WorkloadConfig, phase: Phase) -> Tensor:
    """A fixed random input [batch, new tokens, hidden] of the blocks."""
    norm = stack.blocks[0].post_attention_layernorm
    assert norm is not None
    weight = norm.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (workload.batch_size, phase.new_tokens, len(weight))
    return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)


def all_reduce_ms(architecture: Architecture, workload: WorkloadConfig, hardware: HardwareConfig) -> PhaseTimes:
    """Milliseconds of the all-reduce behind one FFN, modelled as a ring (:func:`puzzle.analytic.modelled_all_reduce`).

    Args:
        architecture: hidden size.
        workload: batch size, prompt, data type and ranks; a single rank has nothing to reduce.
        hardware: rates of the ranks' links.

    Returns:
        For the prompt of the whole batch, and for one token of every sequence.

    Raises:
        ValueError: there are several ranks, and no rates of their links.
    """
    missing = [name for name in ("all_reduce_s", "all_reduce_bytes_per_s") if getattr(hardware, name) is None]
    ranks = workload.tensor_parallel
    require(
        ranks == 1 or not missing,
        f"group_scores: with workload.tensor_parallel={ranks} every FFN ends in an all-reduce, whose time is modelled, "
        f"but costs.hardware has no {' and no '.join(missing)}; name a device, for example "
        "hardware@costs.hardware=h100_sxm, or set both rates",
    )
    all_reduce = modelled_all_reduce(hardware, ranks)
    reduction = Reduction(parent=architecture, workload=workload, all_reduce=all_reduce)
    prefill, decode = phases(workload)
    return reduction.subblock_ms(prefill), reduction.subblock_ms(decode)
