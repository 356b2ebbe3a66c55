"""Models that differ from a parent in some blocks, run beside it on the same sequences.

Nothing before a replaced block is computed again: the base advances block by block, its hidden states before the
current block are kept for all sequences, and variants run from there to the end, several in one forward.

The parent may be dealt over processes (:mod:`puzzle.slices`). All of a replica go through the same forwards in the same
order: earlier slices leave each to later ones, which continue it, and the last slice compares it with the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.distributed import gather_objects, is_main
from distill.engine.base import expect_shapes
from puzzle.blockwise import build_block, precision
from puzzle.library import inherited_names
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMDecoderLayer
from puzzle.model.stats import block_params
from puzzle.score_metrics import METRICS, sequence_metrics
from puzzle.slices import ParentSlice

GROUP_BYTES = 2 << 30
"""Memory for the weights and the final hidden states of variants that share the parent's logits."""

ReplacedTensors = Callable[[int, BlockConfig], Mapping[str, Tensor]]
"""Tensors of the subblocks of a variant that are not the parent's own, by their names in the block."""

Values = dict[str, Tensor]
"""By metric: fp64 [models, sequences] on the CPU."""


@dataclass(kw_only=True)
class _Batch:
    """A batch of sequences on its way through the base."""

    input_ids: Tensor
    """[batch, seq]"""
    hidden: Tensor
    """[batch, seq, hidden], fp32: the base's residual stream before the current block of this slice."""
    final: Tensor | None
    """[batch, seq, hidden]: the parent's output after the final norm; on the last slice alone."""


class ReplacementRuns:
    """Models that differ from a parent in some blocks, run beside it on the same sequences.

    Every process constructs one and calls the same methods in the same order. Arguments are those of
    :func:`puzzle.score.score_variants`.
    """

    def __init__(
        self,
        parent: ParentSlice,
        architecture: Architecture,
        replaced_tensors: ReplacedTensors,
        sequences: Tensor,
        *,
        batch_size: int,
        compile: bool = False,
    ) -> None:
        self._parent = parent
        self._architecture = architecture
        self._replaced_tensors = replaced_tensors
        self._num_sequences = len(sequences)
        self._compile = compile
        self._num_shapes = 0
        self._attention_inputs: dict[int, dict[str, Any]] = {}
        self._batches: list[_Batch] = []
        share = sequences[parent.replica :: parent.num_replicas]
        largest_batch = max(1, min(batch_size, len(share)))
        self._variants_per_forward = max(1, batch_size // largest_batch)
        self._group_state_bytes = 2 * 4 * largest_batch * sequences.shape[1] * architecture.hidden_dim
        self._base = tuple(architecture.blocks)
        self._base_blocks = self._compiled(self._base)
        self._at_entry = True
        with self._running():
            values = [self._run_parent(ids.to(parent.device)) for ids in share.split(batch_size) if len(ids) > 0]
        self.parent_values = self._gathered([_joined(values, num_models=1)])
        """All metrics of the parent beside itself, [1, num_sequences]."""

    def rebase(self, blocks: Sequence[BlockConfig]) -> Values:
        """Make the model with these ``blocks`` the base of further variants; all its metrics, [1, num_sequences]."""
        self._base = tuple(blocks)
        self._base_blocks = self._compiled(self._base)
        self._at_entry = True
        values = []
        with self._running():
            for batch in self._batches:
                batch.hidden = self._entry(batch.input_ids)
                values.append(self._compare(batch, [self._leave(self._through(batch.hidden, self._base_blocks))]))
        return self._gathered([_joined(values, num_models=1)])

    def measure_variants(self, variants: Sequence[Sequence[BlockConfig]], at_base: Values) -> Values:
        """All metrics of the base with one block replaced, [variants of all blocks, num_sequences].

        To be called once for every base. A variant that is the base's own block has the values ``at_base``
        [1, num_sequences] without being run.
        """
        assert self._at_entry, "the base has run through to its end: rebase first"
        self._at_entry = False
        own = self._parent.blocks
        num_variants = sum(variant != self._base[i] for i in range(own.stop) for variant in variants[i])
        measured = []
        with (
            self._running(),
            tqdm(total=num_variants, desc="score", unit="variant", leave=False, disable=not is_main()) as bar,
        ):
            for index, at_block in enumerate(variants[: own.stop]):
                for group in self._groups([variant for variant in at_block if variant != self._base[index]]):
                    bar.set_postfix_str(f"block {index}", refresh=False)
                    measured.append(self._measure_group(index, group))
                    bar.update(len(group))
                if index in own:
                    for batch in self._batches:
                        batch.hidden = self._through(batch.hidden, [self._base_blocks[index - own.start]])
        return self._with_base_rows(variants, self._gathered(measured), at_base)

    def _with_base_rows(self, variants: Sequence[Sequence[BlockConfig]], measured: Values, at_base: Values) -> Values:
        flat = [(index, block) for index, at_block in enumerate(variants) for block in at_block]
        runs = torch.tensor([block != self._base[index] for index, block in flat], dtype=torch.bool)
        values = {name: at_base[name].repeat(len(runs), 1) for name in METRICS}
        if runs.any():
            for name in METRICS:
                values[name][runs] = measured[name]
        return values

    def _measure_group(self, index: int, group: Sequence[BlockConfig]) -> Values:
        """The base with each of ``group`` in place of block ``index``: [group, sequences of this replica]."""
        own = self._parent.blocks
        blocks = [self._block(index, variant) for variant in group] if index in own else []
        later = self._base_blocks[max(0, index + 1 - own.start) :]
        values = []
        for batch in self._batches:
            batch_size, *shape = batch.hidden.shape
            outputs = []
            for first in range(0, len(group), self._variants_per_forward):
                if index in own:
                    chunk = blocks[first : first + self._variants_per_forward]
                    hidden = torch.cat([self._through(batch.hidden, [block]) for block in chunk])
                else:
                    num_variants = min(self._variants_per_forward, len(group) - first)
                    hidden = self._parent.receive((num_variants * batch_size, *shape))
                outputs.append(self._leave(self._through(hidden, later)))
            values.append(self._compare(batch, outputs))
        return _joined(values, num_models=len(group))

    def _groups(self, variants: Sequence[BlockConfig]) -> Iterator[list[BlockConfig]]:
        """``variants`` in groups of at most :data:`GROUP_BYTES`; equal on every process of a replica."""
        group: list[BlockConfig] = []
        used_bytes = 0
        for variant in variants:
            weights = block_params(self._architecture, variant) * self._parent.model.dtype.itemsize
            num_bytes = weights + self._group_state_bytes
            if group and used_bytes + num_bytes > GROUP_BYTES:
                yield group
                group, used_bytes = [], 0
            group.append(variant)
            used_bytes += num_bytes
        if group:
            yield group

    def _run_parent(self, input_ids: Tensor) -> Values:
        hidden, self._attention_inputs[len(input_ids)] = self._parent.enter(input_ids)
        output = self._leave(self._through(hidden, self._base_blocks))
        batch = _Batch(input_ids=input_ids, hidden=hidden, final=self._final(output))
        self._batches.append(batch)
        return self._compare(batch, [output])

    def _entry(self, input_ids: Tensor) -> Tensor:
        """What the slice's first block reads of the base: [batch, seq, hidden]."""
        if self._parent.is_first:
            return self._parent.enter(input_ids)[0]
        return self._parent.receive((*input_ids.shape, self._architecture.hidden_dim))

    def _through(self, hidden: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
        if len(hidden) not in self._attention_inputs:
            self._attention_inputs[len(hidden)] = self._parent.model.model.attention_inputs(hidden)
        for block in blocks:
            hidden = block(hidden, **self._attention_inputs[len(hidden)])
        return hidden

    def _leave(self, hidden: Tensor) -> Tensor:
        self._parent.leave(hidden)
        return hidden

    def _final(self, hidden: Tensor) -> Tensor | None:
        return self._parent.model.model.norm(hidden) if self._parent.is_last else None

    def _compare(self, batch: _Batch, outputs: Sequence[Tensor]) -> Values:
        """Metrics [models, batch] of what left the last slice, [models * batch, seq, hidden] in parts; else nothing."""
        if batch.final is None:
            return {}
        states = torch.cat([self._parent.model.model.norm(output) for output in outputs])
        head = self._parent.model.get_output_embeddings().weight
        children = states.view(-1, *batch.final.shape)
        return sequence_metrics(children, batch.final, head, batch.input_ids, compile=self._compile)

    def _compiled(self, blocks: Sequence[BlockConfig]) -> list[DeciLMDecoderLayer]:
        """This slice's part of ``blocks``; compiled, if asked for, because they run once per variant."""
        own = [self._block(index, blocks[index]) for index in self._parent.blocks]
        if self._compile:
            # Every block of every base, for one variant or several at once, in a full and in the last batch.
            self._num_shapes += len(own) * self._variants_per_forward * 2
            expect_shapes(self._num_shapes)
            for block in own:
                block.compile(dynamic=False)
        return own

    def _block(self, index: int, variant: BlockConfig) -> DeciLMDecoderLayer:
        return variant_block(self._parent, self._architecture, index, variant, self._replaced_tensors)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.no_grad(), precision(self._parent.model):
            yield

    def _gathered(self, groups: Sequence[Values]) -> Values:
        """Values of all sequences, [models, num_sequences], on every process."""
        parent = self._parent
        part = {name: torch.cat([group[name] for group in groups]).cpu() for name in METRICS} if groups else {}
        parts = [(parent.replica, part)]
        if parent.num_slices * parent.num_replicas > 1:
            parts = gather_objects((parent.replica, part if parent.is_last else {}))
        parts = [(replica, values) for replica, values in parts if values]
        num_models = len(parts[0][1]["kld"]) if parts else 0
        gathered = {name: torch.empty(num_models, self._num_sequences, dtype=torch.float64) for name in METRICS}
        for replica, values in parts:
            for name in METRICS:
                gathered[name][:, replica :: parent.num_replicas] = values[name]
        return gathered


def variant_block(
    parent: ParentSlice,
    architecture: Architecture,
    index: int,
    variant: BlockConfig,
    replaced_tensors: ReplacedTensors,
) -> DeciLMDecoderLayer:
    """Block ``index`` as ``variant``, sharing with the parent what it leaves as it is."""
    own = architecture.blocks[index]
    if variant == own:
        return parent.block(index)
    replaced = replaced_tensors(index, variant)
    parameters = dict(parent.block(index).named_parameters())
    tensors: dict[str, Tensor] = {
        name: parameters[name] for name in inherited_names(parameters, own, variant, replaced)
    }
    for name, tensor in replaced.items():
        tensors[name] = tensor.to(parent.device, parent.model.dtype, non_blocking=True)
    return build_block(parent.model, architecture, variant, tensors)


def _joined(batches: Sequence[Values], *, num_models: int) -> Values:
    """Values of several batches side by side, [models, sequences]; no sequences where there is no batch, or no last
    slice."""
    if not batches or not batches[0]:
        return {name: torch.empty(num_models, 0, dtype=torch.float64) for name in METRICS}
    return {name: torch.cat([values[name] for values in batches], dim=1) for name in METRICS}
