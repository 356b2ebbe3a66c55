"""Bytes of the LM heads: chunks of logits and what is made of them. Torch-free."""

from __future__ import annotations

from distill.config import ObjectiveConfig
from launch.plan_activations import Numerics

CHUNK_BYTES = 2**30
"""``distill.chunked_head.CHUNK_BYTES`` of a GPU: most bytes of one model's logits, unless the objective says."""

Parts = dict[str, float]
"""Bytes by what they are of."""


def chunk_rows(tokens: int, vocab: int, chunk_tokens: int) -> int:
    """Tokens whose logits exist at once (``distill.chunked_head.row_chunks``): equal chunks, in fp32."""
    most = chunk_tokens or max(1, CHUNK_BYTES // (4 * vocab))
    return -(-tokens // -(-tokens // most))


def head_bytes(
    tokens: int, vocab: int, hidden: int, objective: ObjectiveConfig, numerics: Numerics, *, has_teacher: bool
) -> Parts:
    """What ``distill.chunked_head.HeadLosses`` holds on a GPU: chunks of fp32 logits of each model and their gradient,
    the head's gradient in fp32, under autocast the head in bf16, and the gradient of its input."""
    if objective.kld == 0 and objective.lm == 0:
        return {}
    c = numerics.product
    models = 2 if has_teacher and objective.kld > 0 else 1
    logits = chunk_rows(tokens, vocab, objective.chunk_tokens) * vocab * (4 * models + c)
    inputs = tokens * hidden * (c + (numerics.residual if numerics.is_autocast else 0))
    cast = c * vocab * hidden if numerics.is_autocast else 0
    return {"logits": float(logits), "gradients": 4.0 * vocab * hidden, "weight casts": cast, "activations": inputs}
