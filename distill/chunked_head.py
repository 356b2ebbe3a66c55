"""LM heads, chunk by chunk: logits, what is computed of them, and the gradient, which is never kept as logits.

Peak memory beside the arguments, on a GPU, at 8,192 tokens, hidden 4,096 and Llama 3's vocabulary in bf16: the head's
gradient in fp32 (2.0 GiB), then in bf16 beside it (1.0); and per chunk the logits of both models in fp32 (1 GiB each)
and their gradient in bf16 (half of one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.data.batch import IGNORE_INDEX
from distill.fused import at_least_fp32
from distill.logits import (
    Divergence,
    VocabShard,
    divergence_and_gradient,
    divergence_value,
    mean_slope,
    normalizers,
    softmax_gradient,
    whole_divergence,
)

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Most bytes of one model's logits that exist at once, where the caller leaves the choice. On a GPU few chunks are
faster: each reads and writes the gradient of the head once."""
MIN_REST = 1e-6
"""Least mass of the tokens that a cached distribution leaves out: below it the rounding of what is kept decides.
A divergence is too large by some 1e-5 where the mass is less."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The most probable next tokens of a teacher at temperature 1, most probable first.

    All other tokens together are one rest token, of mass ``1 - sum(exp(log_probs))``: in fp32 that is good to 1e-7, and
    where there is no other token it may come out as little below 0.
    """

    token_ids: Tensor
    """int64 [..., k]"""
    log_probs: Tensor
    """fp32 [..., k], in nats."""

    def map(self, change: Callable[[Tensor], Tensor]) -> TopK:
        """``change`` of both tensors, which have the same shape."""
        return TopK(token_ids=change(self.token_ids), log_probs=change(self.log_probs))

    def outcomes(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Of ``rows`` of [tokens, k]: token ids, and log-probabilities [tokens, k + 1] of them and the rest, which sum
        to 1."""
        log_p = at_least_fp32(self.log_probs[rows])
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(MIN_REST).log()
        return self.token_ids[rows], torch.cat((log_p, rest), dim=-1).log_softmax(-1)

    def first(self, rows: slice) -> Tensor:
        """The likeliest token of each of ``rows`` of [tokens, k]."""
        best = self.log_probs[rows].argmax(-1, keepdim=True)
        return self.token_ids[rows].gather(1, best)[:, 0]


@dataclass(frozen=True)
class FullTeacher:
    """A teacher by its hidden states and head operand."""

    hidden: Tensor
    operand: Tensor

    def logits(self, rows: slice) -> Tensor:
        """Logits [tokens, vocab] of ``rows``."""
        return project(self.hidden[rows], self.operand)


@dataclass(frozen=True)
class Outcomes:
    """Student and cached teacher on the teacher's likeliest tokens and the rest, for one chunk."""

    token_ids: Tensor
    log_p: Tensor
    log_q: Tensor
    rest_log_z: Tensor
    """Log-normalizer of the tokens that are not among them."""
    nll: Tensor

    @classmethod
    def of(cls, student: Tensor, top: tuple[Tensor, Tensor], labels: Tensor, shard: VocabShard) -> Outcomes:
        """``student`` [tokens, vocab] is -inf at the likeliest tokens afterwards, so that the rest stands alone."""
        token_ids, log_p = top
        kept = shard.gather(student, token_ids)
        label = shard.gather(student, labels[:, None])
        columns, here = shard.locate(token_ids)
        # Where another shard has the token, the least of a logit and inf leaves the logit.
        removed = torch.where(here, -torch.inf, torch.inf).to(student.dtype)
        student.scatter_reduce_(1, columns, removed, "amin")
        parts = torch.cat((kept, normalizers(student).T, label), dim=-1)
        logits = shard.logsumexp(parts)
        log_q = logits[:, :-1].log_softmax(-1)
        log_z = logits[:, :-1].logsumexp(-1)
        nll = (log_z - logits[:, -1]).where(labels != IGNORE_INDEX, 0)
        return cls(token_ids=token_ids, log_p=log_p, log_q=log_q, rest_log_z=logits[:, -2], nll=nll)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """What is computed on each chunk of tokens."""

    teacher: FullTeacher | TopK | None
    labels: Tensor
    weights: tuple[float, float]
    divergence: Divergence
    num_targets: Tensor
    shard: VocabShard
    dtype: torch.dtype
    """Of matrix products."""

    def run(self, student: Tensor, rows: slice, *, train: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Divergence with T^2 and LM loss, each [tokens], 0 at IGNORE_INDEX; and the weighted sum's gradient with
        respect to ``student``, the logits [tokens, vocab] of ``rows``, if they are trained."""
        labels = self.labels[rows]
        counts = (labels != IGNORE_INDEX).to(torch.promote_types(student.dtype, torch.float32))
        kld_scale, lm_scale = (counts * weight / self.num_targets.clamp_min(1) for weight in self.weights)
        if isinstance(self.teacher, FullTeacher):
            value, nll, gradient = self._full(student, self.teacher.logits(rows), labels, (kld_scale, lm_scale), train)
        elif isinstance(self.teacher, TopK):
            value, nll, gradient = self._top(student, self.teacher.outcomes(rows), labels, (kld_scale, lm_scale), train)
        else:
            log_z, nll, _ = log_z_and_nll(student, labels, self.shard)
            columns = labels - self.shard.first
            value, gradient = torch.zeros_like(nll), None
            if train:
                gradient = softmax_gradient(student, log_z, columns, lm_scale, lm_scale, self.dtype)
        return value * counts * self.divergence.temperature**2, nll, gradient

    def _full(
        self, student: Tensor, teacher: Tensor, labels: Tensor, scales: tuple[Tensor, Tensor], train: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        temperature, shard = self.divergence.temperature, self.shard
        log_z, nll, student_log_z = log_z_and_nll(student, labels, shard, temperature)
        teacher_log_z = shard.logsumexp(normalizers(teacher, (temperature,)))[0]
        both = (student_log_z, teacher_log_z)
        if not train:
            return shard.sum(divergence_value(student, teacher, both, self.divergence)), nll, None
        slope = None
        if self.divergence.kind != "forward":
            slope = shard.sum(mean_slope(student, teacher, both, self.divergence))
        lm = (log_z, labels - shard.first, scales[1]) if self.weights[1] > 0 else None
        value, gradient = divergence_and_gradient(
            student, teacher, both, slope, scales[0], self.divergence, lm, self.dtype
        )
        return shard.sum(value), nll, gradient

    def _top(
        self, student: Tensor, top: tuple[Tensor, Tensor], labels: Tensor, scales: tuple[Tensor, Tensor], train: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        outcomes = Outcomes.of(student, top, labels, self.shard)
        value, slope = whole_divergence(outcomes.log_p, outcomes.log_q, self.divergence)
        if not train:
            return value, outcomes.nll, None
        is_label = outcomes.token_ids == labels[:, None]
        q = outcomes.log_q.exp()
        kept = slope[:, :-1] * scales[0][:, None] + (q[:, :-1] - is_label.to(q.dtype)) * scales[1][:, None]
        rest = slope[:, -1] * scales[0] + q[:, -1] * scales[1]
        label_column = (labels - self.shard.first).where(~is_label.any(-1), -1)
        gradient = softmax_gradient(student, outcomes.rest_log_z, label_column, rest, scales[1], self.dtype)
        columns, here = self.shard.locate(outcomes.token_ids)
        # Softmax left zeros at the likeliest tokens: adding is writing, and adds nothing where another shard has them.
        gradient.scatter_add_(1, columns, kept.where(here, 0).to(gradient.dtype))
        return value, outcomes.nll, gradient


class HeadLosses(torch.autograd.Function):
    """(loss, divergence, lm_loss) of :func:`head_losses`; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, chunks: Chunks, chunk_tokens: int, train: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and, if they are trained, the gradients at a loss gradient of 1."""
        operand = matmul_operand(head, hidden)
        accumulator = torch.promote_types(operand.dtype, torch.float32)
        divergence_sum, lm_sum = torch.zeros(2, dtype=accumulator, device=hidden.device)
        train = train and any(ctx.needs_input_grad)
        grad_hidden = torch.empty(hidden.shape, dtype=operand.dtype, device=hidden.device) if train else None
        grad_head = None
        for rows in row_chunks(len(hidden), operand, chunk_tokens):
            inputs = hidden[rows].to(operand.dtype)
            value, nll, gradient = chunks.run(project(inputs, operand), rows, train=train)
            divergence_sum += value.sum()
            lm_sum += nll.sum()
            if grad_hidden is not None and gradient is not None:
                torch.mm(gradient, operand, out=grad_hidden[rows])
                if ctx.needs_input_grad[1]:
                    grad_head = _add_head_gradient(grad_head, gradient, inputs)
            # Not kept beside the next chunk's logits.
            del gradient
        if grad_hidden is not None:
            grad_hidden = chunks.shard.sum(grad_hidden).to(hidden.dtype)
        ctx.gradients = (grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        means = divergence_sum / chunks.num_targets.clamp_min(1), lm_sum / chunks.num_targets.clamp_min(1)
        ctx.mark_non_differentiable(*means)
        return chunks.weights[0] * means[0] + chunks.weights[1] * means[1], *means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients in place, so it runs once."""
        assert ctx.gradients is not None, "backward of head_losses runs once: it scales its gradients in place"
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0]
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_head is not None:
            # One pass, without a scaled copy in fp32 beside it.
            out = grad_head if grad_head.dtype == ctx.head_dtype else torch.empty_like(grad_head, dtype=ctx.head_dtype)
            grad_head = torch.mul(grad_head, scale, out=out)
        return grad_hidden, grad_head, None, None, None


def log_z_and_nll(
    logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalizer and -log q[label] at temperature 1, the latter 0 at IGNORE_INDEX, and the log-normalizer at
    ``temperature``; each [tokens], from one pass over the logits."""
    temperatures = (1.0,) if temperature == 1 else (1.0, temperature)
    label = shard.gather(logits, labels[:, None])
    parts = shard.logsumexp(torch.cat((normalizers(logits, temperatures), label.T)))
    nll = (parts[0] - parts[-1]).where(labels != IGNORE_INDEX, 0)
    return parts[0], nll, parts[len(temperatures) - 1]


def as_teacher(hidden: Tensor | None, head: Tensor | None, top: TopK | None) -> FullTeacher | TopK | None:
    """The teacher that is given, if one is. Nothing of it has a gradient."""
    assert (hidden is None) == (head is None), "a teacher is hidden states and a head"
    assert hidden is None or top is None, "a teacher runs or is cached"
    if hidden is None or head is None:
        return top
    return FullTeacher(hidden.detach(), matmul_operand(head.detach(), hidden))


def row_chunks(num_tokens: int, operand: Tensor, chunk_tokens: int) -> Iterator[slice]:
    """Equal chunks, so that compiled code sees few shapes; the last may be shorter. No tokens are one empty chunk, of
    which everything has the right shape."""
    most = chunk_tokens
    if most == 0:
        row_bytes = len(operand) * torch.promote_types(operand.dtype, torch.float32).itemsize
        most = max(1, CHUNK_BYTES.get(operand.device.type, CHUNK_BYTES["cuda"]) // row_bytes)
    number = max(1, -(-num_tokens // most))
    size = max(1, -(-num_tokens // number))
    for start in range(0, max(1, num_tokens), size):
        yield slice(start, min(start + size, num_tokens))


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What matrix products with ``hidden`` run in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def matmul_operand(head: Tensor, hidden: Tensor) -> Tensor:
    """The head as matrix products with ``hidden`` read it."""
    return head.to(product_dtype(hidden))


def project(hidden: Tensor, operand: Tensor) -> Tensor:
    """Logits [tokens, vocab] in at least fp32. Those of the likeliest tokens are 10 to 30: in bf16 they would be off by
    up to 0.06, which is as much as a student differs from its teacher by in the end."""
    return _wide_product(hidden.to(operand.dtype), operand.T)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in at least fp32."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and dtype != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    # A CPU has no product of bf16 matrices that comes out as fp32.
    with torch.autocast(left.device.type, enabled=False):
        return left.to(dtype) @ right.to(dtype)


def _add_head_gradient(total: Tensor | None, gradient: Tensor, inputs: Tensor) -> Tensor:
    """``total + gradient.T @ inputs`` in at least fp32, in place. No product stands beside the total."""
    if total is None:
        return _wide_product(gradient.T, inputs)
    if gradient.is_cuda and total.dtype != gradient.dtype:
        return torch.addmm(total, gradient.T, inputs, out_dtype=total.dtype, out=total)
    with torch.autocast(gradient.device.type, enabled=False):
        return total.addmm_(gradient.T.to(total.dtype), inputs.to(total.dtype))
