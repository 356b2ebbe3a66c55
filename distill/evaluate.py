"""Held-out evaluation of one model, beside a teacher or alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.data.batch import IGNORE_INDEX, Batch
from distill.forward import forward_inputs
from distill.losses import token_metrics
from distill.objective import teacher_arguments
from distill.teacher import CachedTeacher, Teacher, TeacherSignal

NUM_TARGETS = "num_targets"
_REPORTED_NAMES = {
    "lm_loss": "lm_loss",
    "kld": "kld",
    "kld_top_k": "kld_top_k",
    "top1_agreement": "top1_agreement_frac",
    "teacher_lm_loss": "teacher_lm_loss",
}


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
        ``lm_loss`` (nats per token) and, with a teacher, ``kld`` (KL(teacher || model), nats per token),
        ``top1_agreement_frac`` (share of tokens where both put the same next token first) and ``teacher_lm_loss``.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    with tqdm(total=len(sequences), desc="evaluate", unit="seq", leave=False) as bar:
        for batch in Batch.of(sequences).split(batch_size):
            batch = batch.to(device)
            signal = None if teacher is None else TeacherSignal(**_hidden_and_head(teacher, batch))
            add_sums(sums, _sums(model, batch, signal, chunk_tokens))
            bar.update(len(batch))
    model.train(was_training)
    return means(sums)


def held_out_sums(
    model: nn.Module, batch: Batch, *, teacher: Teacher | CachedTeacher | None, chunk_tokens: int
) -> dict[str, Tensor]:
    """Sums over the positions of ``batch`` that have a label, without gradient, in fp64 on the device.

    Args:
        model: causal LM with the Hugging Face surface, in eval mode.
        batch: on the model's device.
        teacher: whose signals the model is compared with; None: no comparison.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        Sums behind the metrics of :func:`evaluate_model`, and ``num_targets``. :func:`means` makes metrics of them.
        A cached teacher has no ``teacher_lm_loss``, and ``kld_top_k`` in place of ``kld``: on its likeliest tokens and
        the rest, a lower bound.
    """
    return _sums(model, batch, None if teacher is None else teacher.signal(batch), chunk_tokens)


def equal_shares(sequences: Tensor | Batch, *, rank: int, num_ranks: int) -> Batch:
    """``rank``'s share of ``sequences``, as many for every rank.

    Where they do not come out even, the last ranks get the first sequence without labels, which counts nothing: sharded
    models need every rank in every forward.

    Args:
        sequences: token ids [num_sequences, seq], or a batch that says more of them (documents that are kept apart).
        rank: whose share.
        num_ranks: equal shares.
    """
    whole = sequences if isinstance(sequences, Batch) else Batch.of(sequences)
    share = -(-len(whole) // num_ranks)
    missing = torch.zeros(share * num_ranks - len(whole), dtype=torch.int64)
    batch = whole.select(torch.cat((torch.arange(len(whole)), missing)))
    batch.labels[len(whole) :] = IGNORE_INDEX
    return batch.rows(rank * share, (rank + 1) * share)


def add_sums(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add ``more`` to ``sums`` in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of :func:`evaluate_model` from sums over all batches (and ranks). Waits for the device."""
    values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    num_targets = values.pop(NUM_TARGETS)
    return {_REPORTED_NAMES[name]: value / num_targets for name, value in values.items()}


def _sums(model: nn.Module, batch: Batch, teacher: TeacherSignal | None, chunk_tokens: int) -> dict[str, Tensor]:
    student, labels = _hidden_and_head(model, batch), batch.labels.flatten()
    taught: dict[str, Any] = {"teacher_hidden": None, "teacher_head": None}
    if teacher is not None:
        taught |= teacher_arguments(teacher)
    metrics = token_metrics(
        student["hidden"].flatten(0, 1), student["head"], labels=labels, chunk_tokens=chunk_tokens, **taught
    )
    sums = {name: values.sum(dtype=torch.float64) for name, values in metrics.items()}
    return {**sums, NUM_TARGETS: (labels != IGNORE_INDEX).sum(dtype=torch.float64)}


def _hidden_and_head(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    outputs = model.model(batch.input_ids, use_cache=False, **forward_inputs(batch, model))
    return {"hidden": outputs.last_hidden_state, "head": model.get_output_embeddings().weight}
