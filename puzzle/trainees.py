"""Replacements that learn side by side from one frozen parent: the step of blockwise local distillation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.config import OptimConfig
from distill.engine.base import TensorGroups, expect_shapes
from distill.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from puzzle.blockwise import build_block, precision
from puzzle.library import Replacement
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig
from puzzle.model.modeling_decilm import DeciLMDecoderLayer
from puzzle.slices import BlockActivations, ParentSlice, parent_activations, run_block

ADAM_EPS = 1e-15
"""Far below torch's 1e-8. Where one token carries most of a block's power (massive activations: norm 24,000 against a
median of 240 in SmolLM2-135M), gradients of the normalised error are near 1e-8, and the usual epsilon rivals them."""

CALL_BYTES = 8 << 30
"""Activations that the backward pass of one compiled call keeps."""

Case = tuple[DeciLMDecoderLayer, DeciLMDecoderLayer | None, Tensor, Tensor, Mapping[str, Any]]
"""Arguments of :func:`squared_error`."""

Nmse = Literal["tensor", "sample", "token"]
"""See ``LibraryConfig.nmse``."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Errors of one replacement on the held-out sequences."""

    nmse: float
    """MSE(child, parent) / MSE(0, parent) over all tokens at once: the figure to compare libraries by."""
    loss: float
    """The loss that it learns by; equal to ``nmse`` where that is normalised over the tensor."""


def output_power(parent: ParentSlice, sequences: Tensor, *, batch_size: int) -> dict[int, Tensor]:
    """Mean square of the output of each of the slice's blocks, MSE(0, parent): scalars in fp64 on its device."""
    power = {index: torch.zeros((), dtype=torch.float64, device=parent.device) for index in parent.blocks}
    for batch in tqdm(sequences.split(batch_size), desc="block outputs", unit="batch", leave=False):
        for activations in parent_activations(parent, batch):
            power[activations.index] += activations.output.square().mean() * (len(batch) / len(sequences))
    return power


class Trainees:
    """Replacements that learn side by side, with fp32 master weights and one optimizer for all.

    The loss of each is MSE(child, parent) / MSE(0, parent) of the block's output (Puzzle, section 3), over the tensor,
    or per sample or token and then averaged. Over the tensor, the denominator is that of the held-out sequences:
    constant over the run, so that micro-batches add up to their batch exactly.

    Args:
        parent: frozen.
        architecture: of the whole parent.
        inits: weights before training, by replacement; at least one, all of blocks of the slice.
        optim: optimizer settings; ``grad_clip`` bounds each replacement's own gradient.
        power: of :func:`output_power`.
        nmse: what the error is normalised over.
        compiled: whether forward and loss go through torch.compile: one graph per shape of replacement, not per block.
    """

    def __init__(
        self,
        parent: ParentSlice,
        architecture: Architecture,
        inits: Mapping[Replacement, Mapping[str, Tensor]],
        optim: OptimConfig,
        power: Mapping[int, Tensor],
        *,
        nmse: Nmse = "tensor",
        compiled: bool = False,
    ) -> None:
        self.replacements = tuple(inits)
        self.parent = parent
        self._children = nn.ModuleList(
            _build_child(parent, architecture, replacement, tensors) for replacement, tensors in inits.items()
        )
        self._at_block: dict[int, list[int]] = defaultdict(list)
        for position, replacement in enumerate(self.replacements):
            self._at_block[replacement.block].append(position)
        self._power = power
        self._nmse = nmse
        self._compiled = compiled
        self._run_block = torch.compile(run_block, dynamic=False) if compiled else run_block
        self._loss_function = _compile(len(self.replacements)) if compiled else weighted_errors
        self._token_bytes = [_kept_bytes_per_token(architecture, replacement) for replacement in self.replacements]
        self._optimizer = build_optimizer(self._children, optim, eps=ADAM_EPS)
        self._grad_clip = optim.grad_clip
        self._parameters = [list(child.parameters()) for child in self._children]
        self._rows = parameter_rows(self._parameters).to(parent.device)

    def step(self, input_ids: Tensor, *, lr: float, micro_batch: int) -> dict[str, Tensor]:
        """One optimizer step of every replacement on ``input_ids [batch, seq]``, ``micro_batch`` sequences at a time.

        Returns:
            ``nmse``: the median loss over replacements, on the device (NaN ones left out). Never waits for the device.
        """
        losses = torch.zeros(len(self.replacements), device=self.parent.device)
        for part in input_ids.split(micro_batch):
            share = len(part) / len(input_ids)
            for activations in self._activations(part):
                weight = self._weight(activations, self._nmse) * share
                for positions in self._calls(activations):
                    cases = [self._arguments(position, activations) for position in positions]
                    with precision(self.parent.model):
                        errors = self._loss_function(cases, weight)
                    errors.sum().backward()
                    for position, error in zip(positions, errors.detach().unbind(), strict=True):
                        losses[position] += error
        if self._grad_clip > 0:
            clip_each(self._parameters, self._rows, self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"nmse": losses.nanmedian()}

    @torch.no_grad()
    def held_out(self, sequences: Tensor, *, batch_size: int) -> list[HeldOut]:
        """Errors of every replacement over all of ``sequences [num_sequences, seq]``."""
        shape = (len(self.replacements), 2)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.parent.device)
        for batch in tqdm(sequences.split(batch_size), desc="held-out NMSE", unit="batch", leave=False):
            share = len(batch) / len(sequences)
            for activations in self._activations(batch):
                weights = [self._weight(activations, nmse) for nmse in ("tensor", self._nmse)]
                for position in self._at_block[activations.index]:
                    with precision(self.parent.model):
                        error = squared_error(*self._arguments(position, activations))
                    sums[position] += torch.stack([(error * weight).mean() for weight in weights]) * share
        return [HeldOut(nmse=nmse, loss=loss) for nmse, loss in sums.tolist()]

    def tensors(self, replacement: Replacement) -> dict[str, Tensor]:
        """The replacement's weights as they stand."""
        return self._children[self.replacements.index(replacement)].state_dict()

    @property
    def state_bytes(self) -> int:
        """Size of :meth:`state_dict` once there is optimizer state: weights and two moments in fp32."""
        return 3 * 4 * sum(parameter.numel() for child in self._parameters for parameter in child)

    def state_dict(self) -> TensorGroups:
        """Weights and optimizer state, by name; nothing here is random."""
        return {"model": self._children.state_dict(), "optimizer": optimizer_tensors(self._optimizer)}

    def load_state_dict(self, groups: TensorGroups) -> None:
        """Undo of :meth:`state_dict`."""
        self._children.load_state_dict(groups["model"])
        load_optimizer_tensors(self._optimizer, groups["optimizer"])

    def _activations(self, input_ids: Tensor) -> Iterator[BlockActivations]:
        """Those of blocks that have something to learn here; the hidden states travel on all the same."""
        last = max(self._at_block)
        for activations in parent_activations(self.parent, input_ids, run=self._run_block):
            if activations.index in self._at_block:
                yield activations
            if self.parent.is_last and activations.index == last:
                return  # Nothing beyond is asked for, here or elsewhere.

    def _calls(self, activations: BlockActivations) -> Iterator[list[int]]:
        """Replacements at one block that go through forward and backward together.

        One by one, which takes the least memory. Compiled, as many as :data:`CALL_BYTES` admits: each call costs the
        host milliseconds, in which the device is done with a small replacement.
        """
        num_tokens = activations.output.shape[0] * activations.output.shape[1]
        call: list[int] = []
        used_bytes = 0
        for position in self._at_block[activations.index]:
            num_bytes = num_tokens * self._token_bytes[position]
            if call and (not self._compiled or used_bytes + num_bytes > CALL_BYTES):
                yield call
                call, used_bytes = [], 0
            call.append(position)
            used_bytes += num_bytes
        yield call

    def _weight(self, activations: BlockActivations, nmse: Nmse) -> Tensor:
        """One over the parent's mean square: [] over the tensor, [batch, 1] per sample, [batch, seq] per token."""
        if nmse == "tensor":
            return self._power[activations.index].float().reciprocal()
        power = activations.output.square().mean(-1)
        if nmse == "sample":
            power = power.mean(-1, keepdim=True)
        return power.clamp_min(torch.finfo(power.dtype).tiny).reciprocal()

    def _arguments(self, position: int, activations: BlockActivations) -> Case:
        """Those of :func:`squared_error`."""
        replacement = self.replacements[position]
        beside: DeciLMDecoderLayer | None = None
        if replacement.ffn is None and replacement.beside == "parent":
            block = self.parent.block(replacement.block)
            beside = block if block.has_ffn else None
        has_attention = replacement.attention is not None
        from_input = has_attention or replacement.beside == "no_op"
        return (
            self._children[position],
            beside,
            activations.input if from_input else activations.after_attention,
            activations.output,
            activations.attention_inputs if has_attention else {},
        )


def squared_error(
    child: DeciLMDecoderLayer,
    beside: DeciLMDecoderLayer | None,
    hidden: Tensor,
    output: Tensor,
    attention_inputs: Mapping[str, Any],
) -> Tensor:
    """Mean square [batch, seq] over channels of what the child's output lacks of the parent's.

    Args:
        child: holds what is replaced, and no-ops elsewhere.
        beside: block whose FFN follows an attention that is replaced alone; None: none does.
        hidden: [batch, seq, hidden], what the first of the replaced subblocks reads.
        output: [batch, seq, hidden], the parent block's.
        attention_inputs: keyword arguments of an attention; empty where none is replaced.
    """
    if child.has_attention:
        hidden = hidden + child.attention_update(hidden, **attention_inputs)
    ffn = child if child.has_ffn else beside
    if ffn is not None:
        hidden = hidden + ffn.ffn_update(hidden)
    return (hidden - output).square().mean(-1)


def weighted_errors(cases: Sequence[Case], weight: Tensor) -> Tensor:
    """Mean of each case's :func:`squared_error` times ``weight``, which broadcasts to [batch, seq]: [cases]."""
    return torch.stack([(squared_error(*case) * weight).mean() for case in cases])


def _compile(num_replacements: int) -> Callable[..., Tensor]:
    """:func:`weighted_errors`, compiled anew for each set of shapes: blocks with the same variants share its code.

    There are at most as many sets as replacements, each for a full and for a last micro-batch.
    """
    expect_shapes(2 * num_replacements)
    return torch.compile(weighted_errors, dynamic=False)


def clip_each(children: Sequence[Sequence[nn.Parameter]], rows: Tensor, max_norm: float) -> None:
    """Bound the gradient norm of each child by ``max_norm``, as ``clip_grad_norm_`` would one by one.

    One pass over all gradients for the norms, and nothing waits for the device. What becomes of a child's gradient does
    not depend on the others'.

    Args:
        children: parameters of each, all with a gradient.
        rows: of :func:`parameter_rows`, on their device.
        max_norm: > 0.
    """
    grads = [[parameter.grad for parameter in child] for child in children]
    norms = torch.stack(torch._foreach_norm([grad for own in grads for grad in own]))
    squares = torch.cat((norms.square(), norms.new_zeros(1)))
    # Column by column: a child's sum is then the same, bit for bit, whatever the longest child is.
    total = torch.zeros(len(grads), device=norms.device)
    for column in rows.unbind(dim=1):
        total = total + squares[column]
    factors = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for own, factor in zip(grads, factors.unbind(), strict=True):
        torch._foreach_mul_(own, factor)


def parameter_rows(children: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """Positions [children, most parameters of a child] of each child's parameters among all; -1 beyond its last."""
    rows = torch.full((len(children), max(map(len, children))), -1)
    start = 0
    for row, child in zip(rows, children, strict=True):
        row[: len(child)] = torch.arange(start, start + len(child))
        start += len(child)
    return rows


def _kept_bytes_per_token(architecture: Architecture, replacement: Replacement) -> int:
    """Activations that the backward pass needs of one token, roughly: all matrix products' inputs in two bytes, and the
    residual stream in four."""
    num_values = 0
    for subblock in (replacement.attention, replacement.ffn):
        if isinstance(subblock, AttentionConfig):
            num_values += 3 * architecture.num_heads * architecture.head_dim
        elif subblock is not None:
            num_values += 4 * (subblock.ffn_dim or architecture.hidden_dim)
    return 2 * num_values + 4 * 4 * architecture.hidden_dim


def _build_child(
    parent: ParentSlice, architecture: Architecture, replacement: Replacement, tensors: Mapping[str, Tensor]
) -> DeciLMDecoderLayer:
    """A block that holds the replacement alone, trainable."""
    block = BlockConfig(
        attention=replacement.attention or NO_ATTENTION,
        ffn=replacement.ffn or NO_FFN,
        parent_block_indices=(replacement.block,),
    )
    # A copy even where nothing is converted: the init must not change under training.
    masters = {
        name: nn.Parameter(tensor.to(parent.device, torch.float32, copy=True)) for name, tensor in tensors.items()
    }
    return build_block(parent.model, architecture, block, masters).train()
