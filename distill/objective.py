"""The training objective: a weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import ObjectiveConfig, require
from distill.data.batch import Batch
from distill.forward import forward_inputs
from distill.losses import head_losses, hidden_cosine, hidden_mse
from distill.teacher import CachedTeacher, Teacher, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a whole optimizer step counts, over micro-batches and ranks: sums are divided by it."""

    num_positions: int
    """Tokens: batch_size x seq_len."""
    num_targets: Tensor
    """Positions with a label, scalar on the device."""

    @classmethod
    def of(cls, batch: Batch) -> Totals:
        """Of a step that is ``batch`` alone."""
        return cls(num_positions=batch.num_positions, num_targets=batch.num_targets())


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``kld * divergence + hidden_cosine * cosine + hidden_mse * error + lm * cross-entropy`` (Puzzle, GKD).

    Every batch contributes its sum over the totals of the whole step. Contributions of micro-batches and ranks, and
    their gradients, are added up, never averaged:

    - divergence and cross-entropy: sum over positions with a label / labels of the step;
    - hidden cosine: mean over student blocks of the sum over all positions / positions of the step;
    - hidden MSE: likewise of |s - t|^2 / |t|^2, each position relative to its own norm.

    Raises:
        ValueError: a term needs a teacher and there is none, or a cache is asked for what it does not hold.
    """

    config: ObjectiveConfig
    teacher: Teacher | CachedTeacher | None = None
    layer_map: tuple[int, ...] = ()
    """Teacher block that each student block is paired with: the last one that it stands for. The last blocks must be
    paired with each other, because only their outputs are reported after the final norm."""

    def __post_init__(self) -> None:
        config = self.config
        terms = f"objective.kld={config.kld}, hidden_cosine={config.hidden_cosine}, hidden_mse={config.hidden_mse}"
        require(
            self.teacher is not None or not config.needs_teacher,
            f"{terms} need a teacher; give one, or set them to 0",
        )
        if isinstance(self.teacher, CachedTeacher):
            require(
                not config.compares_hidden,
                f"{terms}: hidden states are not cached; set the last two to 0, or let the teacher run",
            )
            require(
                config.temperature == 1,
                f"objective.temperature={config.temperature}, but a cache holds probabilities at temperature 1, of the "
                "likeliest tokens alone; set it to 1, or let the teacher run",
            )
        elif self.teacher is not None and config.compares_hidden:
            last = self.teacher.num_blocks - 1
            assert self.layer_map, "hidden terms pair every student block with one of the teacher"
            assert self.layer_map[-1] == last, f"the last student block is paired with {self.layer_map[-1]}, not {last}"

    def __call__(
        self, model: nn.Module, batch: Batch, totals: Totals | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Contribution of one batch, or of one rank's part of its sequences, to the loss of an optimizer step.

        Args:
            model: the student, with the Hugging Face surface.
            batch: on the model's device.
            totals: of the whole step; None: the batch is the whole step.

        Returns:
            The loss and, detached, the same contributions to ``loss``, ``kld`` (or ``reverse_kld``, ``jsd``; from a
            cache ``kld_top_k`` and so on), ``hidden_cosine``, ``hidden_mse`` and ``lm_loss`` (those that were
            computed), on the device.
        """
        totals = totals or Totals.of(batch)
        compares_hidden = self.config.compares_hidden
        signal = None
        if self.teacher is not None and self.config.needs_teacher:
            signal = self.teacher.start(batch, self.layer_map if compares_hidden else ())
        outputs = model.model(
            batch.input_ids,
            **forward_inputs(batch, model),
            output_hidden_states=compares_hidden,
            use_cache=False,
        )
        taught = None if signal is None else signal()

        loss = torch.zeros((), device=batch.input_ids.device)
        metrics: dict[str, Tensor] = {}
        if taught is not None and compares_hidden:
            loss, metrics = self._hidden_terms(outputs.hidden_states[1:], taught, totals)
        if self.config.reads_logits:
            head = model.get_output_embeddings().weight
            head_loss, head_metrics = self._head_terms(outputs.last_hidden_state, head, batch, taught, totals)
            loss, metrics = loss + head_loss, metrics | head_metrics
        return loss, {"loss": loss.detach(), **metrics}

    def _hidden_terms(
        self, blocks: Sequence[Tensor], taught: TeacherSignal, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [(block, taught.blocks[index]) for block, index in zip(blocks, self.layer_map, strict=True)]
        terms = {
            name: torch.stack([distance(*pair, totals.num_positions) for pair in pairs]).mean()
            for name, distance in (("hidden_cosine", hidden_cosine), ("hidden_mse", hidden_mse))
            if getattr(self.config, name) > 0
        }
        loss = torch.stack([getattr(self.config, name) * term for name, term in terms.items()]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def _head_terms(
        self, hidden: Tensor, head: Tensor, batch: Batch, taught: TeacherSignal | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        signals = {}
        if taught is not None and self.config.kld > 0:
            signals = teacher_arguments(taught)
        return head_losses(
            hidden.flatten(0, 1),
            head,
            labels=batch.labels.flatten(),
            **signals,
            kld_weight=self.config.kld,
            lm_weight=self.config.lm,
            divergence=self.config.divergence,
            jsd_beta=self.config.jsd_beta,
            temperature=self.config.temperature,
            num_targets=totals.num_targets,
            chunk_tokens=self.config.chunk_tokens,
        )


def teacher_arguments(signal: TeacherSignal) -> dict[str, Any]:
    """A teacher's signal as arguments of :func:`distill.losses.head_losses` and ``token_metrics``."""
    if signal.top is not None:
        return {"teacher_top": signal.top.map(lambda tensor: tensor.flatten(0, 1))}
    assert signal.hidden is not None
    return {"teacher_hidden": signal.hidden.flatten(0, 1), "teacher_head": signal.head}
