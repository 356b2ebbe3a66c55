"""Held-out evaluation of one model, beside a teacher or alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.losses import token_metrics
from distill.objective import next_token_hidden, next_token_labels

_REPORTED_NAMES = {"lm_loss": "lm_loss", "kld": "kld", "top1_agreement": "top1_agreement_frac"}


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    sequences: Tensor,
    *,
    teacher: nn.Module | None = None,
    batch_size: int,
    chunk_tokens: int,
) -> dict[str, float]:
    """Means over all tokens of ``sequences`` that have a next token.

    Runs on the model's device, under the caller's autocast.

    Args:
        model: causal LM with the Hugging Face surface.
        sequences: token ids [num_sequences, seq], on any device.
        teacher: model on the same device to compare with; None: no comparison.
        batch_size: sequences per forward.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        ``lm_loss`` (nats per token) and, with a teacher, ``kld`` (KL(teacher || model), nats per token) and
        ``top1_agreement_frac`` (share of tokens where both put the same next token first).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    num_tokens = 0
    with tqdm(total=len(sequences), desc="evaluate", unit="seq", leave=False) as bar:
        for batch in sequences.split(batch_size):
            input_ids = batch.to(device)
            labels = next_token_labels(input_ids)
            teacher_hidden, teacher_head = (None, None) if teacher is None else _hidden_and_head(teacher, input_ids)
            metrics = token_metrics(
                *_hidden_and_head(model, input_ids), teacher_hidden, teacher_head, labels, chunk_tokens
            )
            for name, values in metrics.items():
                sums[name] = sums.get(name, 0) + values.sum(dtype=torch.float64)
            num_tokens += len(labels)
            bar.update(len(batch))
    model.train(was_training)
    return {_REPORTED_NAMES[name]: float(total) / num_tokens for name, total in sums.items()}


def _hidden_and_head(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    return next_token_hidden(hidden), model.get_output_embeddings().weight
