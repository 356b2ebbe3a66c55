"""Training losses and token metrics as pure tensor functions.

Every term is in nats or dimensionless, averaged over tokens. Logits over the full vocabulary exist for one chunk of
tokens at a time only: at Llama 3's vocabulary the logits of one 8,192-token sequence are 4 GiB in fp32, per model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE_INDEX = -100
"""Label of a token that has no LM term, as in torch's cross-entropy."""


def normalized_mse(child: Tensor, parent: Tensor) -> Tensor:
    """MSE(child, parent) / MSE(0, parent) over all elements, in fp32 (Puzzle, section 3: the BLD loss)."""
    child, parent = _at_least_fp32(child), _at_least_fp32(parent)
    return functional.mse_loss(child, parent) / parent.square().mean()


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(student, teacher), in fp32 (Puzzle, GKD).

    Args:
        student: hidden [..., hidden].
        teacher: hidden [..., hidden] of the same shape, without gradient.
    """
    student = _at_least_fp32(student)
    # The teacher is promoted inside each product: autograd then keeps it as it came, not an fp32 copy per block.
    dot = (student * teacher).sum(-1)
    norms = torch.linalg.vector_norm(student, dim=-1) * torch.linalg.vector_norm(teacher, dim=-1, dtype=student.dtype)
    return 1 - (dot / norms.clamp_min(torch.finfo(student.dtype).tiny)).mean()


def head_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    labels: Tensor | None = None,
    kld_weight: float,
    lm_weight: float,
    temperature: float = 1.0,
    chunk_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of forward KL(teacher || student) and LM cross-entropy, through both LM heads, chunk by chunk.

    The gradient is computed beside the loss: backward only scales it by one number, so logits are neither kept nor
    computed again. Matrix products run in autocast's dtype, else in that of the hidden states; softmax runs in fp32.

    Args:
        student_hidden: [tokens, hidden], after the final norm.
        student_head: [vocab, hidden].
        teacher_hidden: [tokens, teacher hidden]; None: no KL term.
        teacher_head: [vocab, teacher hidden].
        labels: next token ids [tokens], IGNORE_INDEX where there is none; None: no LM term.
        kld_weight: weight of the KL term.
        lm_weight: weight of the LM term.
        temperature: of both softmaxes in the KL term, which is multiplied by its square (Hinton et al., 2015).
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        The loss, and detached means per token in nats: ``kld`` if a teacher is given (tempered as in the loss) and
        ``lm_loss`` if labels are, whatever their weights.
    """
    assert teacher_hidden is not None or kld_weight == 0, "a KL term needs a teacher"
    assert labels is not None or lm_weight == 0, "an LM term needs labels"
    teacher = _teacher(teacher_hidden, teacher_head)
    weights = (kld_weight, lm_weight, temperature)
    loss, kld, lm_loss = _HeadLosses.apply(student_hidden, student_head, teacher, labels, weights, chunk_tokens)
    metrics = {}
    if teacher is not None:
        metrics["kld"] = kld
    if labels is not None:
        metrics["lm_loss"] = lm_loss
    return loss, metrics


@torch.no_grad()
def token_metrics(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    chunk_tokens: int,
) -> dict[str, Tensor]:
    """Per-token metrics of a student beside its teacher, chunk by chunk, without gradient.

    Shapes are those of :func:`head_losses`.

    Returns:
        fp32 tensors [tokens]: ``lm_loss`` in nats (0 at IGNORE_INDEX) and, if a teacher is given, ``kld`` in nats and
        ``top1_agreement`` (1 where both put the same token first).
    """
    names = ["lm_loss"] if teacher_hidden is None else ["lm_loss", "kld", "top1_agreement"]
    metrics = {name: torch.empty(len(labels), dtype=torch.float32, device=student_hidden.device) for name in names}
    operand = _matmul_operand(student_head, student_hidden)
    teacher = _teacher(teacher_hidden, teacher_head)
    for start in range(0, len(labels), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        log_q = _log_softmax(student_hidden[rows], operand)
        metrics["lm_loss"][rows] = _nll(log_q, labels[rows]).float()
        if teacher is not None:
            log_p = _log_softmax(teacher[0][rows], teacher[1])
            metrics["kld"][rows] = _kld(log_p.exp(), log_p, log_q).float()
            metrics["top1_agreement"][rows] = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    return metrics


class _HeadLosses(torch.autograd.Function):
    """(loss, kld, lm_loss) of :func:`head_losses`; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        labels: Tensor | None,
        weights: tuple[float, float, float],
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kld_weight, lm_weight, temperature = weights
        num_tokens = len(hidden)
        operand = _matmul_operand(head, hidden)
        accumulator = torch.promote_types(operand.dtype, torch.float32)
        # A tensor: reading the count would wait for the device.
        num_labels = 1 if labels is None else (labels != IGNORE_INDEX).sum().clamp_min(1).to(accumulator)
        kld_sum, lm_sum = torch.zeros(2, dtype=accumulator, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=accumulator, device=head.device)

        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            log_q = _log_softmax(hidden[rows], operand)
            grad_logits = None
            if teacher is not None:
                log_p = _log_softmax(teacher[0][rows], teacher[1], temperature)
                kld, grad_logits = _kld_term(log_q, log_p, temperature, kld_weight / num_tokens)
                kld_sum += kld
            if labels is not None:
                lm_sum += _nll(log_q, labels[rows]).sum()
                if lm_weight > 0:
                    grad_lm = _nll_gradient(log_q, labels[rows], lm_weight / num_labels)
                    grad_logits = grad_lm if grad_logits is None else grad_logits + grad_lm
            if grad_logits is not None:
                grad_logits = grad_logits.to(operand.dtype)
                grad_hidden[rows] = grad_logits @ operand
                grad_head += grad_logits.T @ hidden[rows].to(operand.dtype)

        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        kld_mean, lm_mean = kld_sum / num_tokens, lm_sum / num_labels
        ctx.mark_non_differentiable(kld_mean, lm_mean)
        return kld_weight * kld_mean + lm_weight * lm_mean, kld_mean, lm_mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (grad_hidden * scale.to(grad_hidden.dtype), (grad_head * scale).to(ctx.head_dtype), *[None] * 4)


def _kld_term(log_q: Tensor, log_p: Tensor, temperature: float, scale: float) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the tempered KL times T^2, and its gradient times ``scale`` with respect to the logits.

    Args:
        log_q: the student's log-probabilities [tokens, vocab] at temperature 1.
        log_p: the teacher's at ``temperature``.
        temperature: T.
        scale: factor of the gradient.
    """
    if temperature != 1:
        # Log-probabilities differ from logits by a constant per token, which softmax ignores.
        log_q = (log_q / temperature).log_softmax(-1)
    p = log_p.exp()
    gradient = log_q.exp().sub_(p).mul_(scale * temperature)
    return _kld(p, log_p, log_q).sum() * temperature**2, gradient


def _kld(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [tokens] of distributions [tokens, vocab]."""
    return (log_p - log_q).mul_(p).sum(-1)


def _nll(log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q[label] [tokens], 0 at IGNORE_INDEX."""
    return functional.nll_loss(log_q, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _nll_gradient(log_q: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    """``scale`` times the gradient of the summed :func:`_nll` with respect to the logits [tokens, vocab]."""
    gradient = log_q.exp()
    gradient.scatter_add_(1, labels.clamp_min(0)[:, None], gradient.new_full((len(labels), 1), -1.0))
    return gradient.mul_(((labels != IGNORE_INDEX) * scale)[:, None])


def _matmul_operand(head: Tensor, hidden: Tensor) -> Tensor:
    """The head in the dtype that matrix products with ``hidden`` run in."""
    device = hidden.device.type
    return head.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype)


def _teacher(hidden: Tensor | None, head: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Hidden states and head operand of a teacher, if there is one. Neither has a gradient."""
    assert (hidden is None) == (head is None), "a teacher is hidden states and a head"
    if hidden is None or head is None:
        return None
    return hidden.detach(), _matmul_operand(head.detach(), hidden)


def _log_softmax(hidden: Tensor, operand: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [tokens, vocab] in fp32 (fp64 stays), of a product in the operand's dtype."""
    logits = hidden.to(operand.dtype) @ operand.T
    if temperature != 1:
        logits = _at_least_fp32(logits) / temperature
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
