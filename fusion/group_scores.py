"""What fusing each group of neighbouring FFNs does to a model, and what FFNs of the widths in question take.

Every group of attention-free FFNs is scored with that group alone in parallel form: each member reads the input of the
first, and what they add is summed (FFN Fusion, arXiv 2503.18908, eq. 5), which is what the fused FFN computes (Theorem
3.1). No weights are built. Nothing before a group is computed again: the unfused model advances block by block beside
the groups that are open, and only what follows the end of a group runs anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from fusion.config import Norm
from fusion.group_table import FFNLatency, GroupScore, RemovalScore
from fusion.grouping import Group, group_width
from puzzle.analytic import Phase, phases
from puzzle.blockwise import embed, precision
from puzzle.config import WorkloadConfig
from puzzle.cost import CACHE_BYTES, MAX_COPIES, MIN_COPIES, NUM_ATTEMPTS, random_stack
from puzzle.latency import Step, blocks_step, interleaved_ms, torch_dtype
from puzzle.model import stats
from puzzle.model.architecture import Architecture, FFNConfig, require_sequential
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.score_metrics import sequence_metrics
from puzzle.shard import Shard

Values = dict[str, Tensor]
"""``kld`` and ``lm_loss``, each fp64 [models, sequences]."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Groups and removals of one model, each alone."""

    lm_loss: float
    """Next-token loss of the unfused model, nats per token."""
    groups: tuple[GroupScore, ...]
    removals: tuple[RemovalScore, ...]


def attention_free_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Blocks with nothing but a SwiGLU FFN."""
    return tuple(index for index, block in enumerate(architecture.blocks) if block.is_attention_free)


def scored_groups(architecture: Architecture, max_members: int | None) -> tuple[Group, ...]:
    """Every group of two to ``max_members`` neighbouring attention-free FFNs, none of them fused already.

    Raises:
        ValueError: there is none, or the model has parallel windows.
    """
    require_sequential(architecture.parallel_windows, "score_groups")
    blocks = architecture.blocks
    groups = []
    for run_first, run_last in architecture.attention_free_runs():
        for first in range(run_first, run_last):
            longest = min(run_last, first + (max_members or architecture.num_blocks) - 1)
            for last in range(first + 1, longest + 1):
                if all(len(block.parent_block_indices) == 1 for block in blocks[first : last + 1]):
                    groups.append((first, last))
    require(
        len(groups) > 0,
        f"group_scores: no two neighbouring blocks of the {architecture.num_blocks} have an FFN that is not fused "
        "already, and no attention; remove neighbouring attentions first (stage prune_attention or search)",
    )
    return tuple(groups)


def score_groups(
    model: DeciLMForCausalLM,
    architecture: Architecture,
    sequences: Tensor,
    *,
    norm: Norm,
    batch_size: int,
    max_members: int | None = None,
    compile: bool = False,
) -> Scores:
    """Score every group of :func:`scored_groups`, fused alone, and every attention-free FFN, removed alone.

    Besides the model, memory holds some four hidden states [batch, seq, hidden] in fp32 for every FFN of the longest
    run.

    Args:
        model: unfused, in the data type to score in; matrix products run in it, all else in fp32.
        architecture: of ``model``.
        sequences: token ids [num_sequences, seq].
        norm: "folded": every member reads its own norm of the common input; "last": all read the last member's.
        batch_size: sequences per forward; a batch counts once for each group that shares the forward of what follows.
        max_members: FFNs of the longest group; None: whole runs.
        compile: compile the blocks, in place, and the metrics with torch.compile.

    Raises:
        ValueError: fewer than two sequences, which have no standard error; nothing to fuse.
    """
    require(
        len(sequences) >= 2,
        f"group_scores.num_sequences={len(sequences)}: a standard error takes two sequences or more; raise it",
    )
    groups, removable = scored_groups(architecture, max_members), attention_free_blocks(architecture)
    largest_batch = min(batch_size, len(sequences))
    runs = _GroupRuns(
        model=model,
        groups=frozenset(groups),
        removable=frozenset(removable),
        norm=norm,
        models_per_forward=batch_size // largest_batch,
        compile=compile,
    )
    batches = sequences.split(largest_batch)
    total = len(batches) * (len(groups) + len(removable))
    with torch.no_grad(), precision(model), tqdm(total=total, desc="score", unit="model", leave=False) as progress:
        measured = [runs.measure(batch.to(model.device), progress) for batch in batches]
    of = {
        key: {name: torch.cat([part[key][name] for part in measured]).cpu() for name in _NAMES} for key in measured[0]
    }
    return Scores(
        lm_loss=of[_UNFUSED]["lm_loss"].mean().item(),
        groups=tuple(
            GroupScore(first=group[0], last=group[1], ffn_dim=group_width(architecture, group), **_summary(of[group]))
            for group in groups
        ),
        removals=tuple(RemovalScore(block=index, **_summary(of[index, index])) for index in removable),
    )


_NAMES = ("kld", "lm_loss")
_UNFUSED: Group = (-1, -1)
"""Stands for the unfused model where the others are named by their group; (i, i) is the removal of the FFN of i."""


def _summary(values: Mapping[str, Tensor]) -> dict[str, float]:
    kld = values["kld"]
    return {
        "kld": kld.mean().item(),
        "kld_stderr": kld.std().item() / math.sqrt(len(kld)),
        "lm_loss": values["lm_loss"].mean().item(),
    }


@dataclass(kw_only=True)
class _OpenGroup:
    """A group that later members may still join."""

    first: int
    input: Tensor
    """[batch, seq, hidden], fp32: what all members read."""
    output: Tensor
    """[batch, seq, hidden]: the input, and what the members so far add to it, each by its own norm."""


@dataclass(kw_only=True)
class _GroupRuns:
    """Runs the models that differ from one unfused model in one group or one removal."""

    model: DeciLMForCausalLM
    groups: frozenset[Group]
    removable: frozenset[int]
    norm: Norm
    models_per_forward: int
    compile: bool
    _attention_inputs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compile:
            for block in self._blocks:
                block.compile()

    @property
    def _blocks(self) -> list[DeciLMDecoderLayer]:
        return list(self.model.model.layers)

    def measure(self, input_ids: Tensor, progress: Any) -> dict[Group, Values]:
        """Every model's values on ``input_ids`` [batch, seq], each [batch], on the device."""
        hidden, _ = embed(self.model, input_ids)
        final = self.model.model.norm(self._through(hidden, self._blocks))
        found = self._compared({_UNFUSED: final}, final, input_ids)
        open_groups: list[_OpenGroup] = []
        for index, block in enumerate(self._blocks):
            after = self._through(hidden, [block])
            ended: dict[Group, Tensor] = {(index, index): hidden} if index in self.removable else {}
            open_groups = [group for group in open_groups if (group.first, index) in self.groups]
            for group in open_groups:
                ended[group.first, index] = self._joined(group, index)
            if ended:
                later = self._blocks[index + 1 :]
                found |= self._compared(self._finals(ended, later), final, input_ids)
                progress.update(len(ended))
            open_groups.append(_OpenGroup(first=index, input=hidden, output=after))
            hidden = after
        return found

    def _joined(self, group: _OpenGroup, last: int) -> Tensor:
        """Output [batch, seq, hidden] of ``group`` with the members up to ``last``, which joins it now."""
        if self.norm == "folded":
            group.output = group.output + self._blocks[last].ffn_update(group.input)
            return group.output
        # Another last member is another norm for all of them: no sum of theirs is of use.
        norm = self._blocks[last].post_attention_layernorm
        members = [block.mlp for block in self._blocks[group.first : last + 1]]
        assert norm is not None
        normed, output = norm(group.input), group.input
        for member in members:
            assert member is not None
            output = output + member(normed)
        return output

    def _finals(self, ended: Mapping[Group, Tensor], later: Sequence[DeciLMDecoderLayer]) -> dict[Group, Tensor]:
        """What becomes of hidden states behind one block after the ``later`` ones and the final norm."""
        keys, finals = list(ended), []
        for start in range(0, len(keys), self.models_per_forward):
            chunk = torch.cat([ended[key] for key in keys[start : start + self.models_per_forward]])
            finals.append(self.model.model.norm(self._through(chunk, later)))
        states = torch.cat(finals).unflatten(0, (len(keys), -1))
        return dict(zip(keys, states, strict=True))

    def _compared(self, finals: Mapping[Group, Tensor], unfused: Tensor, input_ids: Tensor) -> dict[Group, Values]:
        head = self.model.get_output_embeddings().weight
        values = sequence_metrics(torch.stack([*finals.values()]), unfused, head, input_ids, compile=self.compile)
        return {key: {name: values[name][row] for name in _NAMES} for row, key in enumerate(finals)}

    def _through(self, hidden: Tensor, blocks: Sequence[DeciLMDecoderLayer]) -> Tensor:
        if len(hidden) not in self._attention_inputs:
            self._attention_inputs[len(hidden)] = self.model.model.attention_inputs(hidden)
        for block in blocks:
            hidden = block(hidden, **self._attention_inputs[len(hidden)])
        return hidden


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

    model: DeciLMForCausalLM
    num_copies: int

    def steps(self, workload: WorkloadConfig, phase: Phase) -> tuple[Step, Step]:
        """Step of all blocks, and of the first half of them."""
        blocks = list(self.model.model.layers)
        long, short = (blocks_step(self.model.model, b, workload, phase) for b in (blocks, blocks[: self.num_copies]))
        return long, short


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
    caches have, or as the model. All stacks are views of the same random weights, so that memory holds the largest one
    alone. Nothing is smoothed. A time that comes out at or below 0 is measured again with twice the repeats.

    Args:
        architecture: hidden size and the model's own size.
        widths: channels of the whole FFN, each a multiple of the workload's ranks.
        workload: batch size, lengths, data type and ranks. With several ranks the time is that of one rank's share,
            without the all-reduce.
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
        model = random_stack(shard, [ffn] * (2 * num_copies[width]), dtype=dtype, device=device)
        _share(model, pool)
        stacks[width] = _Stack(model=model, num_copies=num_copies[width])
    return stacks


def _share(model: DeciLMForCausalLM, pool: Tensor) -> None:
    """Let the matrices of the blocks be consecutive parts of ``pool``."""
    start = 0
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data = pool[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def _subblock_ms(
    stacks: Mapping[int, _Stack], workload: WorkloadConfig, phase: Phase, rounds: dict[str, Any], clamped: list[str]
) -> dict[int, float]:
    """Milliseconds of one FFN by width; what stays below 0 is named in ``clamped``."""
    steps = {width: stack.steps(workload, phase) for width, stack in stacks.items()}
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
