"""The training objective: a weighted sum of named terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import ObjectiveConfig, require
from distill.losses import head_losses, hidden_cosine
from distill.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``kld * KL(teacher || student) + hidden_cosine * cosine + lm * cross-entropy`` (Puzzle, GKD).

    Raises:
        ValueError: a term needs a teacher and there is none.
    """

    config: ObjectiveConfig
    teacher: Teacher | None = None
    layer_map: tuple[int, ...] = ()
    """Teacher block that each student block is paired with: the last one that it stands for. The last blocks must be
    paired with each other, because only their outputs are reported after the final norm."""

    def __post_init__(self) -> None:
        require(
            self.teacher is not None or not self.config.needs_teacher,
            f"objective.kld={self.config.kld} and objective.hidden_cosine={self.config.hidden_cosine} need a teacher; "
            "give one, or set both to 0",
        )
        if self.teacher is not None and self.config.hidden_cosine > 0:
            last = self.teacher.num_blocks - 1
            assert self.layer_map, "the hidden cosine pairs every student block with one of the teacher"
            assert all((block == last) == (i == len(self.layer_map) - 1) for i, block in enumerate(self.layer_map))

    def __call__(self, model: nn.Module, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and detached metrics on one batch.

        The KL and LM terms are means over the positions that have a next token, the cosine over all positions. Every
        sequence weighs the same, so a batch's loss is the mean of its micro-batches' losses weighted by sequences.

        Args:
            model: the student, with the Hugging Face surface.
            input_ids: [batch, seq].

        Returns:
            The loss and ``loss``, ``kld``, ``hidden_cosine`` and ``lm_loss`` (those that were computed), on the device.
        """
        use_cosine = self.config.hidden_cosine > 0
        signal = None
        if self.teacher is not None and self.config.needs_teacher:
            signal = self.teacher.signal(input_ids, self.layer_map if use_cosine else ())
        outputs = model.model(input_ids, output_hidden_states=use_cosine, use_cache=False)

        loss = torch.zeros((), device=input_ids.device)
        metrics: dict[str, Tensor] = {}
        if signal is not None and use_cosine:
            pairs = zip(outputs.hidden_states[1:], self.layer_map, strict=True)
            distances = [hidden_cosine(student, signal.blocks[block]) for student, block in pairs]
            cosine = torch.stack(distances).mean()
            loss = loss + self.config.hidden_cosine * cosine
            metrics["hidden_cosine"] = cosine.detach()
        if self.config.kld > 0 or self.config.lm > 0:
            taught = signal if self.config.kld > 0 else None
            head_loss, head_metrics = head_losses(
                next_token_hidden(outputs.last_hidden_state),
                model.get_output_embeddings().weight,
                teacher_hidden=None if taught is None else next_token_hidden(taught.hidden),
                teacher_head=None if taught is None else taught.head,
                labels=next_token_labels(input_ids),
                kld_weight=self.config.kld,
                lm_weight=self.config.lm,
                temperature=self.config.temperature,
                chunk_tokens=self.config.chunk_tokens,
            )
            loss = loss + head_loss
            metrics |= head_metrics
        return loss, {"loss": loss.detach(), **metrics}


def next_token_hidden(hidden: Tensor) -> Tensor:
    """[batch, seq, hidden] -> [batch * (seq - 1), hidden]: the positions that have a next token."""
    return hidden[:, :-1].flatten(0, 1)


def next_token_labels(input_ids: Tensor) -> Tensor:
    """[batch, seq] -> [batch * (seq - 1)]: the token after each of those positions."""
    return input_ids[:, 1:].flatten()
