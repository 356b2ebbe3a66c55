"""The ways to a distillation loss and its gradient through two LM heads that are compared, each as one function.

A contender is prepared with the settings, which may fail where its library is missing, and is then called with the four
tensors and the labels. It returns the mean divergence per token; backward() then leaves gradients at the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[["Problem"], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Student and teacher of one step."""

    student_hidden: Tensor
    """[tokens, hidden]"""
    student_head: Tensor
    """[vocab, hidden]"""
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    """[tokens]"""

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_head

    def slice(self, num_tokens: int, dtype: torch.dtype) -> Problem:
        """The first tokens, as leaves of their own."""
        rows = slice(0, num_tokens)
        return Problem(
            student_hidden=self.student_hidden.detach()[rows].to(dtype).clone().requires_grad_(),
            student_head=self.student_head.detach().to(dtype).clone().requires_grad_(),
            teacher_hidden=self.teacher_hidden[rows].to(dtype),
            teacher_head=self.teacher_head.to(dtype),
            labels=self.labels[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The divergence, at temperature 1."""

    divergence: str
    """forward: KL(teacher || student); jsd: the Jensen-Shannon divergence with both weights 1/2."""

    @property
    def beta(self) -> float:
        """As Liger and TRL number it."""
        return {"forward": 0.0, "jsd": 0.5}[self.divergence]


def ours(goal: Goal, chunk_tokens: int = 0) -> Loss:
    from distill.losses import head_losses

    def loss(problem: Problem) -> Tensor:
        return head_losses(
            problem.student_hidden,
            problem.student_head,
            labels=problem.labels,
            teacher_hidden=problem.teacher_hidden,
            teacher_head=problem.teacher_head,
            kld_weight=1.0,
            lm_weight=0.0,
            divergence=goal.divergence,  # type: ignore[arg-type]
            chunk_tokens=chunk_tokens,
        )[0]

    return loss


def plain(goal: Goal) -> Loss:
    """The formula with whole logits: products in the data type of the heads, softmax in fp32 (or fp64)."""

    def loss(problem: Problem) -> Tensor:
        dtype = torch.promote_types(problem.student_head.dtype, torch.float32)
        log_q = (problem.student_hidden @ problem.student_head.T).log_softmax(-1, dtype=dtype)
        log_p = (problem.teacher_hidden @ problem.teacher_head.T).log_softmax(-1, dtype=dtype)
        if goal.divergence == "forward":
            return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=dtype))
        halves = [functional.kl_div(log_m, log_x, log_target=True, reduction="batchmean") for log_x in (log_p, log_q)]
        return sum(halves) / 2

    return loss


def liger_fused(goal: Goal) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=goal.beta)
    return lambda p: module(p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)


def liger_chunked(goal: Goal) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=goal.beta, compiled=torch.cuda.is_available()
    )
    return lambda p: module(p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)


def trl(goal: Goal) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(p: Problem) -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            p.student_hidden, p.student_head, None, p.teacher_hidden, p.teacher_head, None, goal.beta
        )
        return per_token.mean()

    return loss


def four_products(goal: Goal) -> Loss:
    """No loss: the four matrix products that a gradient needs, with the logits in place of their gradient."""

    def loss(p: Problem) -> Tensor:
        with torch.no_grad():
            logits = p.student_hidden @ p.student_head.T
            teacher_logits = p.teacher_hidden @ p.teacher_head.T
            p.student_hidden.grad = logits @ p.student_head
            p.student_head.grad = logits.T @ p.student_hidden
        return teacher_logits[0, 0] * 0

    return loss


CONTENDERS: dict[str, Callable[[Goal], Loss]] = {
    "ours": ours,
    "liger_chunked": liger_chunked,
    "trl": trl,
    "liger_fused": liger_fused,
    "plain": plain,
    "four_products": four_products,
} | {f"ours_{chunk}": (lambda goal, chunk=chunk: ours(goal, chunk)) for chunk in (512, 1024, 2048, 4096)}
"""What matters most first. ``ours_<n>`` takes n tokens at once, ``ours`` as many as it chooses."""

COMPUTES_NO_LOSS = ("four_products",)
