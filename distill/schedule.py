"""The learning-rate schedule: a function of the fraction of the token budget that is spent. Torch-free."""

from __future__ import annotations

import math

from distill.config import OptimConfig


def learning_rate(config: OptimConfig, spent_frac: float) -> float:
    """Learning rate at ``spent_frac`` of the token budget (0..1): linear warm-up, then the configured decay."""
    warmup = config.warmup_frac
    if spent_frac < warmup:
        return config.lr * spent_frac / warmup
    decayed_frac = (spent_frac - warmup) / (1 - warmup) if warmup < 1 else 0.0
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * decayed_frac)),
        "linear": 1 - decayed_frac,
        "constant": 1.0,
    }[config.schedule]
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * remaining)
