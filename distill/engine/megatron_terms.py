"""Terms on hidden states, each in the stage that has the block: student and teacher side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.config import ObjectiveConfig
from distill.losses import hidden_cosine, hidden_mse


class _AddTerm(torch.autograd.Function):
    """Activations as they are; in the backward pass the term's gradient sets out beside theirs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, term: Tensor) -> Tensor:
        ctx.like_term = term.new_ones(term.shape)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], ctx.like_term


def add_term(hidden: Tensor, term: Tensor) -> Tensor:
    """``hidden``, through which ``term`` becomes part of what is minimised: where a later stage has the loss."""
    return _AddTerm.apply(hidden, term)


class HiddenTerms:
    """The hidden-state terms of one micro-batch in one stage.

    Args:
        config: weights of the terms.
        layer_map: teacher block that each student block is paired with.
        targets: outputs of the teacher's blocks of this stage, by index, as the student's are laid out.
        num_positions: of the whole optimizer step.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        layer_map: tuple[int, ...],
        *,
        targets: dict[int, Tensor],
        num_positions: int,
    ) -> None:
        self._config = config
        self._layer_map = layer_map
        self._targets = targets
        self._num_positions = num_positions
        self.loss: Tensor | None = None
        """Weighted sum of the terms so far, with its gradient; of this rank's tokens."""
        self.metrics: dict[str, Tensor] = {}
        """Terms so far without weights; of this rank's tokens."""

    def __call__(self, block: int, hidden: Tensor) -> Tensor:
        """Compare the output of student block ``block`` with its target. Returns it as it is."""
        target = self._targets[self._layer_map[block]]
        scale = 1 / len(self._layer_map)
        for name, distance in (("hidden_cosine", hidden_cosine), ("hidden_mse", hidden_mse)):
            weight = getattr(self._config, name)
            if weight > 0:
                self._add(name, weight, distance(hidden, target, self._num_positions) * scale)
        return hidden

    def _add(self, name: str, weight: float, term: Tensor) -> None:
        self.loss = weight * term + (0 if self.loss is None else self.loss)
        self.metrics[name] = self.metrics.get(name, 0) + term.detach()
