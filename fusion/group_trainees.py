"""Groups that learn side by side from one frozen unfused model: the step of block-local distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.config import OptimConfig
from distill.engine.base import TensorGroups, expect_shapes
from distill.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from fusion.config import Norm
from fusion.grouping import Group
from puzzle.blockwise import build_block, precision
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader
from puzzle.model.modeling_decilm import DeciLMDecoderLayer
from puzzle.model.tensor_layout import block_prefix, block_shapes
from puzzle.slices import ParentSlice, parent_activations, run_block
from puzzle.trainees import ADAM_EPS, HeldOut, clip_each, parameter_rows

Learners = Mapping[Group, tuple[int, ...]]
"""Group, in blocks of the unfused model -> blocks of the checkpoint that learn for it; both in rising order."""


def squared_errors(
    members: Sequence[DeciLMDecoderLayer], hidden: Tensor, output: Tensor, norm: Norm, *, sequential: bool
) -> Tensor:
    """Mean squares of what the members lack of ``output``: [parallel, one after another], or [parallel] alone.

    Args:
        members: attention-free blocks; a fused FFN is a single one.
        hidden: [batch, seq, hidden], fp32, what the first of them reads.
        output: [batch, seq, hidden], the unfused model's after the last of them.
        norm: of the parallel form: each member's own ("folded") or the last one's for all.
        sequential: whether the second error is asked for.
    """
    parallel = hidden
    for member in members:
        normed_by = member if norm == "folded" else members[-1]
        assert member.mlp is not None
        assert normed_by.post_attention_layernorm is not None
        parallel = parallel + member.mlp(normed_by.post_attention_layernorm(hidden))
    errors = [(parallel - output).square().mean()]
    if sequential:
        chained = hidden
        for member in members:
            chained = chained + member.ffn_update(chained)
        errors.append((chained - output).square().mean())
    return torch.stack(errors)


class GroupTrainees:
    """Groups that learn side by side, with fp32 master weights and one optimizer for all.

    The loss of each is the normalised error of its parallel form, plus ``sequential_weight`` times that of its members
    one after another where there are several. The denominator is MSE(0, model) of the held-out sequences: constant over
    the run, so that micro-batches add up to their batch exactly.

    Args:
        parent: the unfused model, or its blocks up to the last group's end; frozen.
        architecture: of the checkpoint that learns.
        reader: of the same.
        learners: at least one group.
        optim: optimizer settings.
        power: of :func:`puzzle.trainees.output_power`.
        norm: see :func:`fusion.group_distillation.distill_groups`.
        sequential_weight: see :func:`fusion.group_distillation.distill_groups`.
        compiled: whether forward and loss go through torch.compile: one graph per shape of group.
    """

    def __init__(
        self,
        parent: ParentSlice,
        architecture: Architecture,
        reader: TensorReader,
        learners: Learners,
        optim: OptimConfig,
        power: Mapping[int, Tensor],
        *,
        norm: Norm,
        sequential_weight: float,
        compiled: bool = False,
    ) -> None:
        self.parent = parent
        self.groups = tuple(learners)
        self.sequential_nmse: list[float | None] = []
        """Of every group, when last measured; None for fused ones."""
        self._learners = dict(learners)
        self._by_first = {group[0]: position for position, group in enumerate(self.groups)}
        self._members = nn.ModuleList(
            nn.ModuleList(_build_member(parent, architecture, reader, block) for block in blocks)
            for blocks in learners.values()
        )
        self._weights = [power[last].float().reciprocal() for _, last in self.groups]
        self._norm: Norm = norm
        self._sequential_weight = sequential_weight
        self._run_block = torch.compile(run_block, dynamic=False) if compiled else run_block
        # The model's blocks are compiled one shape after another too.
        self._squared_errors = _compile(max(len(self.groups), parent.num_blocks)) if compiled else squared_errors
        self._optimizer = build_optimizer(self._members, optim, eps=ADAM_EPS)
        self._grad_clip = optim.grad_clip
        self._parameters = [list(members.parameters()) for members in self._members]
        self._rows = parameter_rows(self._parameters).to(parent.device)

    def step(self, input_ids: Tensor, *, lr: float, micro_batch: int) -> dict[str, Tensor]:
        """One optimizer step of every group on ``input_ids [batch, seq]``, ``micro_batch`` sequences at a time.

        Returns:
            ``nmse`` of the parallel form and ``loss``: medians over groups, on the device (NaN ones left out). Never
            waits for the device.
        """
        nmses, losses = torch.zeros(2, len(self.groups), device=self.parent.device)
        for part in input_ids.split(micro_batch):
            share = len(part) / len(input_ids)
            for position, hidden, output in self._activations(part):
                members = list(self._members[position])
                learns_both = len(members) > 1 and self._sequential_weight > 0
                with precision(self.parent.model):
                    errors = self._squared_errors(members, hidden, output, self._norm, sequential=learns_both)
                errors = errors * self._weights[position] * share
                loss = errors[0] + self._sequential_weight * errors[1] if learns_both else errors[0]
                loss.backward()
                nmses[position] += errors[0].detach()
                losses[position] += loss.detach()
        if self._grad_clip > 0:
            clip_each(self._parameters, self._rows, self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"nmse": nmses.nanmedian(), "loss": losses.nanmedian()}

    @torch.no_grad()
    def held_out(self, sequences: Tensor, *, batch_size: int) -> list[HeldOut]:
        """Errors of every group over all of ``sequences [num_sequences, seq]``: ``nmse`` is the parallel form's."""
        sums = torch.zeros(len(self.groups), 2, dtype=torch.float64, device=self.parent.device)
        for batch in tqdm(sequences.split(batch_size), desc="held-out NMSE", unit="batch", leave=False):
            share = len(batch) / len(sequences)
            for position, hidden, output in self._activations(batch):
                members = list(self._members[position])
                with precision(self.parent.model):
                    errors = squared_errors(members, hidden, output, self._norm, sequential=len(members) > 1)
                sums[position, : len(errors)] += errors * self._weights[position] * share
        rows = sums.tolist()
        several = [len(members) > 1 for members in self._members]
        self.sequential_nmse = [row[1] if measured else None for row, measured in zip(rows, several, strict=True)]
        weight = self._sequential_weight
        # Without weight it has no say, not even as NaN.
        return [HeldOut(nmse=row[0], loss=row[0] + weight * row[1] if weight > 0 else row[0]) for row in rows]

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the master weights to ``dtype``, in which they will be stored."""
        for parameter in self._members.parameters():
            parameter.copy_(parameter.to(dtype))

    def tensors(self, group: Group) -> dict[str, Tensor]:
        """The group's weights as they stand, under their names in the checkpoint."""
        members = self._members[self.groups.index(group)]
        return {
            block_prefix(block) + name: tensor
            for block, member in zip(self._learners[group], members, strict=True)
            for name, tensor in member.state_dict().items()
        }

    @property
    def state_bytes(self) -> int:
        """Size of :meth:`state_dict` once there is optimizer state: weights and two moments in fp32."""
        return 3 * 4 * sum(parameter.numel() for parameter in self._members.parameters())

    def state_dict(self) -> TensorGroups:
        """Weights and optimizer state, by name; nothing here is random."""
        return {"model": self._members.state_dict(), "optimizer": optimizer_tensors(self._optimizer)}

    def load_state_dict(self, tensors: TensorGroups) -> None:
        """Undo of :meth:`state_dict`."""
        self._members.load_state_dict(tensors["model"])
        load_optimizer_tensors(self._optimizer, tensors["optimizer"])

    def _activations(self, input_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Position of every group, and the hidden states [batch, seq, hidden] before and after it."""
        position, hidden = 0, None
        for activations in parent_activations(self.parent, input_ids, run=self._run_block):
            if activations.index in self._by_first:
                position, hidden = self._by_first[activations.index], activations.input
            if hidden is not None and activations.index == self.groups[position][1]:
                yield position, hidden, activations.output
                hidden = None
                if position == len(self.groups) - 1:
                    return  # Nothing beyond is asked for.


def _build_member(
    parent: ParentSlice, architecture: Architecture, reader: TensorReader, block: int
) -> DeciLMDecoderLayer:
    """Attention-free ``block`` of the checkpoint that ``reader`` reads, trainable."""
    config = architecture.blocks[block]
    masters = {
        name: nn.Parameter(reader.read(block_prefix(block) + name).to(parent.device, torch.float32, copy=True))
        for name in block_shapes(architecture, config)
    }
    return build_block(parent.model, architecture, config, masters).train()


def _compile(num_shapes: int) -> Callable[..., Tensor]:
    """:func:`squared_errors`, compiled anew for each of ``num_shapes`` at most, full and last micro-batch apart."""
    expect_shapes(2 * num_shapes)
    return torch.compile(squared_errors, dynamic=False)
