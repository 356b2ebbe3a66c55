"""Replacements that learn side by side from one frozen parent: the step of blockwise local distillation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from distill.config import OptimConfig
from distill.engine.base import TensorGroups
from distill.optim import build_optimizer
from puzzle.blockwise import BlockActivations, build_block, parent_activations, precision
from puzzle.library import Replacement
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM

ADAM_EPS = 1e-15
"""Far below torch's 1e-8. Where one token carries most of a block's power (massive activations: norm 24,000 against a
median of 240 in SmolLM2-135M), gradients of the normalised error are near 1e-8, and the usual epsilon rivals them."""


def output_power(parent: DeciLMForCausalLM, sequences: Tensor, *, batch_size: int) -> Tensor:
    """Mean square of every block's output, MSE(0, parent): [num_blocks], fp64, on the parent's device."""
    num_blocks = len(parent.model.layers)
    power = torch.zeros(num_blocks, dtype=torch.float64, device=parent.device)
    for batch in tqdm(sequences.split(batch_size), desc="block outputs", unit="batch", leave=False):
        for activations in parent_activations(parent, batch, num_blocks=num_blocks):
            power[activations.index] += activations.output.square().mean() * (len(batch) / len(sequences))
    return power


class Trainees:
    """Replacements that learn side by side, with fp32 master weights and one optimizer for all.

    The loss of each is MSE(child, parent) / MSE(0, parent) of the block's output (Puzzle, section 3). The denominator
    is that of the held-out sequences: constant over the run, so that micro-batches add up to their batch exactly.

    Args:
        parent: frozen.
        architecture: of the parent.
        inits: weights before training, by replacement.
        optim: optimizer settings; ``grad_clip`` bounds each replacement's own gradient.
        power: of :func:`output_power`.
    """

    def __init__(
        self,
        parent: DeciLMForCausalLM,
        architecture: Architecture,
        inits: Mapping[Replacement, Mapping[str, Tensor]],
        optim: OptimConfig,
        power: Tensor,
    ) -> None:
        self.replacements = tuple(inits)
        self.parent = parent
        self._children = nn.ModuleList(
            _build_child(parent, architecture, replacement, tensors) for replacement, tensors in inits.items()
        )
        self._at_block: dict[int, list[int]] = defaultdict(list)
        for position, replacement in enumerate(self.replacements):
            self._at_block[replacement.block].append(position)
        self._num_blocks = max(self._at_block) + 1
        self._power = power.float()
        self._optimizer = build_optimizer(self._children, optim, eps=ADAM_EPS)
        self._grad_clip = optim.grad_clip

    def step(self, input_ids: Tensor, *, lr: float, micro_batch: int) -> dict[str, Tensor]:
        """One optimizer step of every replacement on ``input_ids [batch, seq]``, ``micro_batch`` sequences at a time.

        Returns:
            ``nmse``: the median loss over replacements, on the device (NaN ones left out). Never waits for the device.
        """
        losses = torch.zeros(len(self.replacements), device=self.parent.device)
        for part in input_ids.split(micro_batch):
            share = len(part) / len(input_ids)
            for activations in parent_activations(self.parent, part, num_blocks=self._num_blocks):
                for position in self._at_block[activations.index]:
                    loss = self._nmse(position, activations) * share
                    loss.backward()
                    losses[position] += loss.detach()
        if self._grad_clip > 0:
            for child in self._children:
                nn.utils.clip_grad_norm_(child.parameters(), self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"nmse": losses.nanmedian()}

    @torch.no_grad()
    def held_out_nmse(self, sequences: Tensor, *, batch_size: int) -> list[float]:
        """NMSE of every replacement over all of ``sequences [num_sequences, seq]``."""
        nmse = torch.zeros(len(self.replacements), dtype=torch.float64, device=self.parent.device)
        for batch in tqdm(sequences.split(batch_size), desc="held-out NMSE", unit="batch", leave=False):
            share = len(batch) / len(sequences)
            for activations in parent_activations(self.parent, batch, num_blocks=self._num_blocks):
                for position in self._at_block[activations.index]:
                    nmse[position] += self._nmse(position, activations) * share
        return nmse.tolist()

    def tensors(self, replacement: Replacement) -> dict[str, Tensor]:
        """The replacement's weights as they stand."""
        return self._children[self.replacements.index(replacement)].state_dict()

    def state_dict(self) -> TensorGroups:
        """Weights and optimizer state, by name; nothing here is random."""
        state = self._optimizer.state_dict()["state"]
        optimizer = {f"{index}/{key}": value for index, values in state.items() for key, value in values.items()}
        return {"model": self._children.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, groups: TensorGroups) -> None:
        """Undo of :meth:`state_dict`."""
        self._children.load_state_dict(groups["model"])
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in groups["optimizer"].items():
            index, _, key = name.partition("/")
            state[int(index)][key] = value
        param_groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(state), "param_groups": param_groups})

    def _nmse(self, position: int, activations: BlockActivations) -> Tensor:
        replacement, child = self.replacements[position], self._children[position]
        with precision(self.parent):
            output = _child_output(replacement, child, self.parent.model.layers[replacement.block], activations)
        return functional.mse_loss(output, activations.output) / self._power[replacement.block]


def _build_child(
    parent: DeciLMForCausalLM, architecture: Architecture, replacement: Replacement, tensors: Mapping[str, Tensor]
) -> DeciLMDecoderLayer:
    """A block that holds the replacement alone, trainable."""
    variant, indices = replacement.variant, (replacement.block,)
    if isinstance(variant, AttentionConfig):
        block = BlockConfig(attention=variant, ffn=NO_FFN, parent_block_indices=indices)
    else:
        block = BlockConfig(attention=NO_ATTENTION, ffn=variant, parent_block_indices=indices)
    # A copy even where nothing is converted: the init must not change under training.
    masters = {
        name: nn.Parameter(tensor.to(parent.device, torch.float32, copy=True)) for name, tensor in tensors.items()
    }
    return build_block(parent, architecture, block, masters).train()


def _child_output(
    replacement: Replacement, child: nn.Module, parent_block: nn.Module, activations: BlockActivations
) -> Tensor:
    """Output [batch, seq, hidden] of the parent's block with the replacement in its place."""
    if replacement.subblock == "attention":
        hidden = activations.input
        hidden = hidden + child.attention_update(hidden, **activations.attention_inputs)
        return hidden + parent_block.ffn_update(hidden) if parent_block.has_ffn else hidden
    hidden = activations.input if replacement.beside == "no_op" else activations.after_attention
    return hidden + child.ffn_update(hidden)
