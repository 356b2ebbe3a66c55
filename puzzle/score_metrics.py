"""What a child does to its parent's output, sequence by sequence: the metrics behind replace-1-block scores.

Logits over the whole vocabulary exist for one chunk of tokens at a time, the parent's once for all children that are
measured together. Softmax and all sums over the vocabulary run in fp32, means over tokens in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

METRICS = ("kld", "lm_loss", "top1_disagreement", "hidden_cosine")
"""Per token: KL(parent || child) in nats, next-token loss in nats, whether the likeliest next token is another, and
1 - cos between the final hidden states."""

CHUNK_VALUES = {"cpu": 6_000_000, "cuda": 100_000_000}
"""Logits of one model that exist at once, by device: 122 and 2,034 tokens of a vocabulary of 49,152. A GPU needs long
chunks to be busy; a CPU is faster where memory for a chunk (24 MB in fp32) is used again, not asked for anew."""

TokenMetrics = tuple[Tensor, Tensor, Tensor]


def sequence_metrics(
    children: Tensor, parent: Tensor, head: Tensor, input_ids: Tensor, *, compile: bool = False
) -> dict[str, Tensor]:
    """Means over the positions that have a next token, for every child and sequence.

    Args:
        children: hidden states after the final norm [children, batch, seq, hidden].
        parent: the parent's [batch, seq, hidden].
        head: LM head of parent and children [vocab, hidden].
        input_ids: [batch, seq].
        compile: fuse what follows the logits with torch.compile; the values differ by rounding.

    Returns:
        Every one of :data:`METRICS` as an absolute value of the child, ``[children, batch]`` fp64 on the device.
    """
    num_children, batch_size, seq_len, _ = children.shape
    states, teacher = children[:, :, :-1].flatten(1, 2), parent[:, :-1].flatten(0, 1)
    labels = input_ids[:, 1:].flatten()
    tokens = {name: torch.empty(states.shape[:2], dtype=torch.float32, device=states.device) for name in METRICS}
    operand = head.to(_matmul_dtype(states))
    of_logits = _compiled() if compile else _of_logits
    chunk_tokens = max(1, CHUNK_VALUES[states.device.type] // len(head))
    for start in range(0, len(labels), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        log_p = _logits(teacher[rows], operand).log_softmax(-1, dtype=_at_least_fp32(operand.dtype))
        p, top1 = log_p.exp(), log_p.argmax(-1)
        for child in range(num_children):
            logits = _logits(states[child, rows], operand)
            kld, lm_loss, disagrees = of_logits(logits, log_p, p, top1, labels[rows])
            tokens["kld"][child, rows] = kld
            tokens["lm_loss"][child, rows] = lm_loss
            tokens["top1_disagreement"][child, rows] = disagrees
    for child in range(num_children):
        tokens["hidden_cosine"][child] = _cosine_distance(states[child], teacher)
    shape = (num_children, batch_size, seq_len - 1)
    return {name: values.view(shape).mean(-1, dtype=torch.float64) for name, values in tokens.items()}


def _of_logits(logits: Tensor, log_p: Tensor, p: Tensor, top1: Tensor, labels: Tensor) -> TokenMetrics:
    """KLD, LM loss and top-1 disagreement [tokens] of a child's logits [tokens, vocab].

    ``log_p``, ``p`` [tokens, vocab] and ``top1`` [tokens] are the parent's log-probabilities, probabilities and
    likeliest tokens.
    """
    log_q = logits.log_softmax(-1, dtype=log_p.dtype)
    lm_loss = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    disagrees = (log_q.argmax(-1) != top1).to(log_p.dtype)
    # The difference first: a sum of p log p less a sum of p log q loses what small divergences are made of. In place,
    # because a chunk is large.
    kld = -log_q.sub_(log_p).mul_(p).sum(-1)
    return kld, lm_loss, disagrees


@cache
def _compiled() -> Callable[..., TokenMetrics]:
    """One for the process, which torch keeps its code with, and for the shorter chunk at the end too."""
    return torch.compile(_of_logits, dynamic=True)


def _cosine_distance(child: Tensor, parent: Tensor) -> Tensor:
    """1 - cos [tokens] of hidden states [tokens, hidden], in fp32 at least."""
    dtype = _at_least_fp32(child.dtype)
    child, parent = child.to(dtype), parent.to(dtype)
    norms = torch.linalg.vector_norm(child, dim=-1) * torch.linalg.vector_norm(parent, dim=-1)
    return 1 - (child * parent).sum(-1) / norms.clamp_min(torch.finfo(dtype).tiny)


def _logits(hidden: Tensor, operand: Tensor) -> Tensor:
    return hidden.to(operand.dtype) @ operand.T


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """That of matrix products with ``hidden``: autocast's, if it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
