"""Arithmetic on the logits of one chunk of tokens: softmax, divergences and their gradients.

A chunk's logits are large (1 GiB in fp32 for 2,093 tokens of Llama 3's vocabulary), so what counts is how often they
are read. On a GPU every function marked ``fused`` is compiled: the normalizers read each logits tensor once, a
divergence reads both again and writes the gradient, and nothing else of that size exists. On a CPU the same code runs
as it stands. Arithmetic is in fp32 (fp64 stays).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from distill.fused import at_least_fp32, fused

Kind = Literal["forward", "reverse", "jsd"]
"""As ``ObjectiveConfig.divergence``."""


def divergence_name(kind: Kind, *, top_k: bool) -> str:
    """What a divergence is called among metrics. One of a cached teacher (``top_k``) is another quantity: on k + 1
    outcomes it is a lower bound of that on the whole vocabulary."""
    name = {"forward": "kld", "reverse": "reverse_kld", "jsd": "jsd"}[kind]
    return f"{name}_top_k" if top_k else name


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far the student's distribution q is from the teacher's p, at one temperature.

    forward: KL(p || q); reverse: KL(q || p); jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    (Agarwal et al., 2024, On-Policy Distillation, section 2).
    """

    kind: Kind = "forward"
    beta: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class VocabShard:
    """The tokens ``rank * size`` to ``(rank + 1) * size - 1`` that one rank of a group has the logits of."""

    size: int
    group: ProcessGroup | None = None

    @property
    def first(self) -> int:
        """First token."""
        return 0 if self.group is None else distributed.get_rank(self.group) * self.size

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the tokens in this shard, 0 for those that it has not; and whether it has them."""
        columns = token_ids - self.first
        here = (columns >= 0) & (columns < self.size)
        return columns.where(here, 0), here

    def gather(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Logits [tokens, n] of ``token_ids`` [tokens, n]; -inf where another shard has them, or none."""
        columns, here = self.locate(token_ids)
        return at_least_fp32(logits.gather(1, columns)).where(here, -math.inf)

    def logsumexp(self, parts: Tensor) -> Tensor:
        """log of the sum over the ranks of exp(parts): from the shards' log-normalizers those of the vocabulary."""
        if self.group is None:
            return parts
        return self._gathered(parts).logsumexp(0)

    def sum(self, parts: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            distributed.all_reduce(parts, group=self.group)
        return parts

    def argmax(self, logits: Tensor) -> Tensor:
        """Token [tokens] of the largest logit, the first of equal ones."""
        largest, columns = logits.max(-1)
        if self.group is None:
            return columns
        rank = self._gathered(largest).argmax(0, keepdim=True)
        return self._gathered(columns + self.first).gather(0, rank)[0]

    def _gathered(self, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.stack(parts)


@fused
def normalizers(logits: Tensor, temperatures: tuple[float, ...] = (1.0,)) -> Tensor:
    """log sum exp(logits / T) [len(temperatures), tokens] of ``logits`` [tokens, vocab]."""
    found = []
    for temperature in temperatures:
        tempered = _tempered(logits, temperature)
        # Spelt out: in this form a compiler finds maximum and sum in one pass.
        largest = tempered.amax(-1, keepdim=True)
        found.append(((tempered - largest).exp().sum(-1, keepdim=True).log() + largest)[:, 0])
    return torch.stack(found)


@fused
def mean_slope(student: Tensor, teacher: Tensor, log_z: tuple[Tensor, Tensor], divergence: Divergence) -> Tensor:
    """The mean [tokens] over q of :func:`_slope`, summed over the logits at hand."""
    log_q = _tempered(student, divergence.temperature) - log_z[0][:, None]
    log_p = _tempered(teacher, divergence.temperature) - log_z[1][:, None]
    return (log_q.exp() * _slope(log_p, log_q, divergence)).sum(-1)


@fused
def divergence_and_gradient(
    student: Tensor,
    teacher: Tensor,
    log_z: tuple[Tensor, Tensor],
    slope: Tensor | None,
    scale: Tensor,
    divergence: Divergence,
    lm: tuple[Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A divergence, and the gradient of what is trained, in one pass over both logits.

    Args:
        student: logits [tokens, vocab].
        teacher: logits [tokens, vocab].
        log_z: normalizers [tokens] of student and teacher at the divergence's temperature.
        slope: :func:`mean_slope` over the whole vocabulary; forward needs none.
        scale: [tokens], weight of the divergence in the gradient.
        divergence: which.
        lm: of a cross-entropy that is trained too, normalizers at temperature 1, columns of the labels (any other
            number: not here) and weights, each [tokens].
        dtype: of the gradient, which matrix products read.

    Returns:
        The divergence [tokens] without the factor T^2, summed over the logits at hand, and the gradient [tokens, vocab]
        with respect to the student's logits, in ``dtype``.
    """
    log_q = _tempered(student, divergence.temperature) - log_z[0][:, None]
    log_p = _tempered(teacher, divergence.temperature) - log_z[1][:, None]
    value = _terms(log_p, log_q, divergence).sum(-1)
    # T^2 times 1 / T, the derivative of the tempered logits.
    gradient = _gradient(log_p, log_q, slope, divergence) * (scale * divergence.temperature)[:, None]
    if lm is not None:
        gradient = gradient + _cross_entropy_gradient(student, *lm)
    return value, gradient.to(dtype)


@fused
def softmax_gradient(
    logits: Tensor, log_z: Tensor, columns: Tensor, scale: Tensor, label_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """``scale * softmax(logits) - label_scale * one_hot(columns)`` [tokens, vocab], in ``dtype``."""
    gradient = _softmax(logits, log_z) * scale[:, None] - _one_hot(columns, logits) * label_scale[:, None]
    return gradient.to(dtype)


@fused
def divergence_value(student: Tensor, teacher: Tensor, log_z: tuple[Tensor, Tensor], divergence: Divergence) -> Tensor:
    """The value of :func:`divergence_and_gradient` alone."""
    log_q = _tempered(student, divergence.temperature) - log_z[0][:, None]
    log_p = _tempered(teacher, divergence.temperature) - log_z[1][:, None]
    return _terms(log_p, log_q, divergence).sum(-1)


def whole_divergence(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Value [tokens] and gradient [tokens, n] with respect to the logits of q, of whole distributions [tokens, n]."""
    slope = None
    if divergence.kind != "forward":
        slope = (log_q.exp() * _slope(log_p, log_q, divergence)).sum(-1)
    return _terms(log_p, log_q, divergence).sum(-1), _gradient(log_p, log_q, slope, divergence)


def _terms(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """What a divergence sums over the vocabulary."""
    if divergence.kind == "forward":
        return log_p.exp() * (log_p - log_q)
    if divergence.kind == "reverse":
        return log_q.exp() * (log_q - log_p)
    beta, log_m = divergence.beta, _log_mixture(log_p, log_q, divergence.beta)
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _gradient(log_p: Tensor, log_q: Tensor, slope: Tensor | None, divergence: Divergence) -> Tensor:
    """Derivative with respect to the logits that q is the softmax of: q (s - mean over q of s), s the slope."""
    if slope is None:
        # s = -p / q, whose mean is -1.
        return log_q.exp() - log_p.exp()
    return log_q.exp() * (_slope(log_p, log_q, divergence) - slope[:, None])


def _slope(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Derivative of the divergence with respect to q, up to a constant."""
    if divergence.kind == "reverse":
        return log_q - log_p
    assert divergence.kind == "jsd", "the forward divergence has a gradient without its slope"
    return (1 - divergence.beta) * (log_q - _log_mixture(log_p, log_q, divergence.beta))


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _cross_entropy_gradient(logits: Tensor, log_z: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    return (_softmax(logits, log_z) - _one_hot(columns, logits)) * scale[:, None]


def _softmax(logits: Tensor, log_z: Tensor) -> Tensor:
    return (at_least_fp32(logits) - log_z[:, None]).exp()


def _one_hot(columns: Tensor, logits: Tensor) -> Tensor:
    hits = torch.arange(logits.shape[1], device=logits.device) == columns[:, None]
    return hits.to(torch.promote_types(logits.dtype, torch.float32))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_fp32(logits)
    return logits if temperature == 1 else logits / temperature
