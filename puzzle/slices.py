"""A parent dealt over processes: consecutive slices of its blocks, and replicas that share the work.

With ``engine.slices=S`` and W processes, W / S replicas of the parent each span S processes. Process p holds slice
``p % S`` of replica ``p // S``: its own blocks, the embedding if the slice is the first, final norm and head if it is
the last. Hidden states travel from slice to slice of one replica; nothing else does until results are gathered. One
process is the case S = W = 1, where a slice is the whole model and nothing travels.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill import distributed
from distill.config import EngineConfig, require
from distill.engine.base import resolve_device, resolve_dtype
from puzzle.blockwise import embed, precision
from puzzle.model.architecture import Architecture, require_sequential
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.model.stats import block_params

Item = TypeVar("Item")
RunBlock = Callable[[DeciLMDecoderLayer, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]]

MAX_SENDS = 4
"""Hidden states on their way to the next slice at once: a slice that runs ahead of the next one is held back."""


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """What one parent block reads and writes, each [batch, seq, hidden], fp32, without gradient."""

    index: int
    input: Tensor
    after_attention: Tensor
    """The residual stream between attention and FFN; the input where there is no attention."""
    output: Tensor
    attention_inputs: Mapping[str, Any]
    """Keyword arguments of every attention: rotation and mask."""


@dataclass(frozen=True, kw_only=True)
class ParentSlice:
    """The blocks of a parent that this process holds."""

    model: DeciLMForCausalLM
    """Its layers are the slice's blocks alone. Embedding, norm and head exist where :attr:`is_first` and
    :attr:`is_last` say so."""
    blocks: range
    """Indices of the blocks in the parent."""
    num_blocks: int
    """Blocks of the whole parent."""
    slice_index: int = 0
    num_slices: int = 1
    replica: int = 0
    num_replicas: int = 1
    _sends: deque[tuple[Any, Tensor]] = field(init=False, repr=False, compare=False, default_factory=deque)
    """Handle and tensor of every send that may not have ended."""

    @classmethod
    def whole(cls, model: DeciLMForCausalLM) -> ParentSlice:
        """All of ``model`` in one process.

        Raises:
            ValueError: some of its blocks run in parallel.
        """
        require_sequential(model.config.parallel_windows, "this stage")
        num_blocks = len(model.model.layers)
        return cls(model=model, blocks=range(num_blocks), num_blocks=num_blocks)

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.slice_index == 0

    @property
    def is_last(self) -> bool:
        """Whether final norm and head are here."""
        return self.slice_index == self.num_slices - 1

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.model.device

    def block(self, index: int) -> DeciLMDecoderLayer:
        """Block ``index`` of the parent, which must be one of :attr:`blocks`."""
        return self.model.model.layers[index - self.blocks.start]

    def own_blocks(self) -> Iterator[tuple[int, DeciLMDecoderLayer]]:
        """Index in the parent and block, in order."""
        return zip(self.blocks, self.model.model.layers, strict=True)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This replica's share of ``items``: every num_replicas-th, so that shares differ by one item at most."""
        return items[self.replica :: self.num_replicas]

    def enter(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the slice's first block reads: ``[batch, seq, hidden]`` fp32, embedded here or received from the slice
        before, and the keyword arguments of every attention."""
        if self.is_first:
            return embed(self.model, input_ids)
        hidden = self.receive((*input_ids.shape, self.model.config.hidden_size))
        return hidden, self.model.model.attention_inputs(hidden)

    def receive(self, shape: Sequence[int]) -> Tensor:
        """What the slice before hands over next: fp32, of the ``shape`` that it has there."""
        assert not self.is_first
        hidden = torch.empty(tuple(shape), dtype=torch.float32, device=self.device)
        distributed.receive_into(hidden, source=distributed.rank() - 1)
        return hidden

    def leave(self, hidden: Tensor) -> None:
        """Hand ``hidden`` to the next slice, in fp32; nothing where this is the last.

        Does not wait, unless the next slice is :data:`MAX_SENDS` behind. ``hidden`` must not be written to afterwards.
        """
        if self.is_last:
            return
        if len(self._sends) >= MAX_SENDS:
            self._sends.popleft()[0].wait()
        sent = hidden.detach().float().contiguous()
        self._sends.append((distributed.start_send(sent, to=distributed.rank() + 1), sent))


def load_slice(directory: Path, engine: EngineConfig) -> ParentSlice:
    """This process's slice of the model in ``directory``: no other tensor is read.

    Every process of :func:`distill.distributed.together` has to call it; outside, it is the whole model.

    Raises:
        ValueError: no checkpoint, or one whose blocks run in parallel; the processes, blocks or CUDA devices are not
            enough for ``engine.slices``.
    """
    architecture = read_architecture(directory)
    require_sequential(architecture.parallel_windows, "this stage")
    num_slices, world_size, rank = engine.slices, distributed.world_size(), distributed.rank()
    require(
        world_size % num_slices == 0,
        f"engine.slices={num_slices} does not divide the {world_size} processes that run together; "
        f"start a multiple of it: torchrun --nproc-per-node {num_slices} -m launch ...",
    )
    device = resolve_device(engine)
    require(
        device.type == "cpu" or distributed.local_rank() < torch.cuda.device_count(),
        f"process {distributed.local_rank()} of this host has no CUDA device of its own, there are "
        f"{torch.cuda.device_count()}; start torchrun with --nproc-per-node {torch.cuda.device_count()}",
    )
    blocks = slice_blocks(architecture, num_slices)[rank % num_slices]
    return ParentSlice(
        model=load_model(directory, device=device, dtype=resolve_dtype(engine), blocks=blocks),
        blocks=blocks,
        num_blocks=architecture.num_blocks,
        slice_index=rank % num_slices,
        num_slices=num_slices,
        replica=rank // num_slices,
        num_replicas=world_size // num_slices,
    )


def slice_blocks(architecture: Architecture, num_slices: int) -> list[range]:
    """The blocks of every slice: consecutive, at least one each, so that the largest slice is as small as can be.

    A slice is as large as its weights, embedding and head included; where they are tied, first and last have one each.

    Raises:
        ValueError: fewer blocks that hold weights than slices.
    """
    params = [block_params(architecture, block) for block in architecture.blocks]
    num_blocks = sum(size > 0 for size in params)
    require(
        num_slices <= num_blocks,
        f"engine.slices={num_slices} is more than the {num_blocks} blocks of the parent that hold weights; lower it",
    )
    embedding = architecture.vocab_size * architecture.hidden_dim
    params[0] += embedding
    params[-1] += embedding + architecture.hidden_dim
    return _split_evenly(params, num_slices)


def _split_evenly(sizes: Sequence[int], num_parts: int) -> list[range]:
    """Consecutive parts of ``sizes``, none of them empty or of size zero, with the least largest sum."""
    ends = [0, *itertools.accumulate(sizes)]

    def largest(start: int, middle: int, best: Sequence[float]) -> float:
        """Of the parts of what ends at ``middle``, and of one more part behind it."""
        return max(best[start], ends[middle] - ends[start] or math.inf)

    # best[n]: the least largest part of the first n sizes; starts[n]: where the last of those parts starts.
    best: list[float] = [0.0, *[math.inf] * len(sizes)]
    all_starts: list[list[int]] = []
    for _ in range(num_parts):
        starts = [min(range(max(end, 1)), key=lambda start: largest(start, end, best)) for end in range(len(ends))]
        best = [largest(start, end, best) for end, start in enumerate(starts)]
        all_starts.append(starts)
    parts, stop = [], len(sizes)
    for starts in reversed(all_starts):
        parts.append(range(starts[stop], stop))
        stop = starts[stop]
    return parts[::-1]


def run_block(block: DeciLMDecoderLayer, hidden: Tensor, attention_inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The residual stream after attention and after FFN, each [batch, seq, hidden]."""
    after_attention = hidden
    if block.has_attention:
        after_attention = hidden + block.attention_update(hidden, **attention_inputs)
    output = after_attention
    if block.has_ffn:
        output = after_attention + block.ffn_update(after_attention)
    return after_attention, output


def parent_activations(
    parent: ParentSlice, input_ids: Tensor, *, run: RunBlock = run_block
) -> Iterator[BlockActivations]:
    """Activations of the slice's blocks, one block at a time: none is kept after the next is asked for.

    Every process of a replica must ask for the same ``input_ids`` [batch, seq], in the same order. ``run`` is
    :func:`run_block`, or what torch.compile made of it.
    """
    with torch.no_grad(), precision(parent.model):
        hidden, attention_inputs = parent.enter(input_ids)
    for index, block in parent.own_blocks():
        with torch.no_grad(), precision(parent.model):
            after_attention, output = run(block, hidden, attention_inputs)
        yield BlockActivations(
            index=index,
            input=hidden,
            after_attention=after_attention,
            output=output,
            attention_inputs=attention_inputs,
        )
        hidden = output
    parent.leave(hidden)
