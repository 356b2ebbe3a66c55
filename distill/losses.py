"""Training losses and token metrics as pure tensor functions.

Every term is in nats or dimensionless. Logits over the full vocabulary exist for one chunk of tokens at a time only: at
Llama 3's vocabulary the logits of one 8,192-token sequence are 2 GiB in bf16, per model, and 4 GiB in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

from distill.chunked_head import (
    Chunks,
    HeadLosses,
    Outcomes,
    TopK,
    as_teacher,
    log_z_and_nll,
    matmul_operand,
    product_dtype,
    project,
    row_chunks,
)
from distill.data.batch import IGNORE_INDEX
from distill.fused import at_least_fp32, fused
from distill.logits import Divergence, Kind, VocabShard, divergence_name, divergence_value, whole_divergence


def normalized_mse(child: Tensor, parent: Tensor) -> Tensor:
    """MSE(child, parent) / MSE(0, parent) over all elements, in fp32 (Puzzle, section 3: the BLD loss)."""
    child, parent = at_least_fp32(child), at_least_fp32(parent)
    return functional.mse_loss(child, parent) / parent.square().mean()


def hidden_cosine(student: Tensor, teacher: Tensor, num_positions: int | None = None) -> Tensor:
    """Sum over positions of 1 - cos(student, teacher), divided by ``num_positions``, in fp32 (Puzzle, GKD).

    Keeps nothing for the backward pass but the two arguments and two numbers per position. A position where either is
    zero is at distance 1 and has no gradient.

    Args:
        student: hidden [..., hidden].
        teacher: hidden [..., hidden] of the same shape, without gradient.
        num_positions: of the whole optimizer step; None: those at hand, which gives their mean.
    """
    return _HiddenDistance.apply(student, teacher.detach(), "cosine") / (num_positions or student[..., 0].numel())


def hidden_mse(student: Tensor, teacher: Tensor, num_positions: int | None = None) -> Tensor:
    """Sum over positions of |student - teacher|^2 / |teacher|^2, divided by ``num_positions``, in fp32.

    Every position is relative to its own norm: one with a massive activation weighs as much as any other, and what
    batches, micro-batches and ranks contribute adds up. Keeps nothing for the backward pass but the two arguments and
    two numbers per position. A position where the teacher is zero counts 0 and has no gradient.

    Args:
        student: hidden [..., hidden].
        teacher: hidden [..., hidden] of the same shape, without gradient.
        num_positions: of the whole optimizer step; None: those at hand, which gives their mean.
    """
    return _HiddenDistance.apply(student, teacher.detach(), "mse") / (num_positions or student[..., 0].numel())


def head_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    *,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_top: TopK | None = None,
    kld_weight: float,
    lm_weight: float,
    divergence: Kind = "forward",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    num_targets: Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    chunk_tokens: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of a divergence from the teacher and LM cross-entropy, through the LM heads, chunk by chunk.

    The gradient is computed beside the loss: backward only scales it by one number, so logits are neither kept nor
    computed again. Backward can run once. Matrix products run in autocast's dtype, else in that of the hidden states;
    softmax and the sum of the head's gradient over chunks are in fp32.

    Only positions with a label count. A teacher comes as hidden states and head, or as its k likeliest tokens; then
    both models are compared on k + 1 outcomes, those tokens and any other, at temperature 1: the divergence is a lower
    bound of the one on the full vocabulary, and the gradient within the rest is in proportion to the student's
    probabilities.

    Args:
        student_hidden: [tokens, hidden], after the final norm.
        student_head: [vocab, hidden].
        labels: next token ids [tokens], IGNORE_INDEX where there is none.
        teacher_hidden: [tokens, teacher hidden].
        teacher_head: [vocab, teacher hidden].
        teacher_top: in place of them; k is less than the vocabulary (of a shard, where it is shared).
        kld_weight: weight of the divergence.
        lm_weight: weight of the LM term.
        divergence: forward, reverse or jsd (:class:`distill.logits.Divergence`).
        jsd_beta: weight of the teacher in jsd's mixture.
        temperature: T of both softmaxes in the divergence, which is multiplied by T^2 (Hinton et al., 2015).
        num_targets: scalar, positions with a label that sums are divided by: those of the whole optimizer step. None:
            those in ``labels``, which gives means.
        vocab_group: ranks that share the vocabulary in equal parts, in order: heads are [vocab / ranks, hidden]. All
            other arguments are equal on its ranks. So are loss, metrics and the gradient of the hidden states, which is
            summed over the ranks here; the gradient of the head is the shard's.
        chunk_tokens: most tokens whose logits exist at once; 0: as many as fill ``CHUNK_BYTES`` in each model.

    Returns:
        The loss, and detached sums over ``num_targets`` in nats, whatever their weights: ``lm_loss`` and, if a teacher
        is given, the divergence with T^2 as ``kld``, ``reverse_kld`` or ``jsd``, of ``teacher_top`` as ``kld_top_k``,
        ``reverse_kld_top_k`` or ``jsd_top_k``.
    """
    teacher = as_teacher(teacher_hidden, teacher_head, teacher_top)
    assert teacher is not None or kld_weight == 0, "a divergence needs a teacher"
    assert teacher_top is None or temperature == 1, "the mass of the rest is known at temperature 1 alone"
    if num_targets is None:
        num_targets = (labels != IGNORE_INDEX).sum()
    chunks = Chunks(
        teacher=teacher,
        labels=labels,
        weights=(kld_weight, lm_weight),
        divergence=Divergence(kind=divergence, beta=jsd_beta, temperature=temperature),
        num_targets=num_targets,
        shard=VocabShard(len(student_head), vocab_group),
        dtype=product_dtype(student_hidden),
    )
    train = torch.is_grad_enabled() and max(chunks.weights) > 0
    loss, divergence_mean, lm_mean = HeadLosses.apply(student_hidden, student_head, chunks, chunk_tokens, train)
    metrics = {} if teacher is None else {divergence_name(divergence, top_k=teacher_top is not None): divergence_mean}
    return loss, metrics | {"lm_loss": lm_mean}


@torch.no_grad()
def token_metrics(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    chunk_tokens: int = 0,
    *,
    teacher_top: TopK | None = None,
    vocab_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Per-token metrics of a student beside its teacher, chunk by chunk, without gradient.

    Arguments are those of :func:`head_losses`.

    Returns:
        fp32 tensors [tokens], 0 at IGNORE_INDEX: ``lm_loss`` in nats and, if a teacher is given, ``top1_agreement`` (1
        where both put the same token first), ``kld`` (KL(teacher || student), in nats) and ``teacher_lm_loss``. A
        cached one has no ``teacher_lm_loss``, and ``kld_top_k`` in place of ``kld``.
    """
    teacher, shard = as_teacher(teacher_hidden, teacher_head, teacher_top), VocabShard(len(student_head), vocab_group)
    operand = matmul_operand(student_head, student_hidden)
    parts: dict[str, list[Tensor]] = {}
    for rows in row_chunks(len(labels), operand, chunk_tokens):
        student = project(student_hidden[rows], operand)
        first = shard.argmax(student)
        found = {}
        if isinstance(teacher, TopK):
            outcomes = Outcomes.of(student, teacher.outcomes(rows), labels[rows], shard)
            found["kld_top_k"], _ = whole_divergence(outcomes.log_p, outcomes.log_q, Divergence())
            found["top1_agreement"] = first == teacher.first(rows)
            found["lm_loss"] = outcomes.nll
        else:
            log_z, found["lm_loss"], _ = log_z_and_nll(student, labels[rows], shard)
            if teacher is not None:
                logits = teacher.logits(rows)
                teacher_log_z, found["teacher_lm_loss"], _ = log_z_and_nll(logits, labels[rows], shard)
                found["kld"] = shard.sum(divergence_value(student, logits, (log_z, teacher_log_z), Divergence()))
                found["top1_agreement"] = first == shard.argmax(logits)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.float() * (labels[rows] != IGNORE_INDEX))
    return {name: torch.cat(values) for name, values in parts.items()}


class _HiddenDistance(torch.autograd.Function):
    """Sum over positions of a distance, whose gradient is ``a * teacher + b * student``."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: str) -> Tensor:
        distance, by_teacher, by_student = (_relative_error if kind == "mse" else _cosine_distance)(student, teacher)
        ctx.save_for_backward(student, teacher, by_teacher, by_student)
        return distance.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, by_teacher, by_student = ctx.saved_tensors
        return _combination(student, teacher, by_student, by_teacher, grad_outputs[0]), None, None


@fused
def _relative_error(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance over the teacher's squared norm [..., 1], and the factors of teacher and student in its
    gradient."""
    student, teacher = at_least_fp32(student), at_least_fp32(teacher)
    error, square = (x.square().sum(-1, keepdim=True) for x in (student - teacher, teacher))
    inverse = square.clamp_min(torch.finfo(square.dtype).tiny).reciprocal().where(square > 0, 0)
    return error * inverse, -2 * inverse, 2 * inverse


@fused
def _cosine_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One minus the cosine [..., 1], and the factors of teacher and student in its gradient."""
    student, teacher = at_least_fp32(student), at_least_fp32(teacher)
    dot, student_square, teacher_square = (
        product.sum(-1, keepdim=True) for product in (student * teacher, student.square(), teacher.square())
    )
    tiny = torch.finfo(student.dtype).tiny
    inverse = student_square.clamp_min(tiny).rsqrt() * teacher_square.clamp_min(tiny).rsqrt()
    inverse = inverse.where((student_square > 0) & (teacher_square > 0), 0)
    cosine = dot * inverse
    return 1 - cosine, -inverse, cosine / student_square.clamp_min(tiny)


@fused
def _combination(student: Tensor, teacher: Tensor, by_student: Tensor, by_teacher: Tensor, scale: Tensor) -> Tensor:
    """``scale * (by_student * student + by_teacher * teacher)`` in the student's data type."""
    total = by_student * at_least_fp32(student) + by_teacher * at_least_fp32(teacher)
    return (scale * total).to(student.dtype)
